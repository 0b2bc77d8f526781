"""The measures of a recipe, taken of the dense model and, once it was changed, of the compressed one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from armor_recipes.checkpoint.staging import tried
from armor_recipes.compute.ranks import alone, first, leads
from armor_recipes.errors import CheckpointError, NumericalError, QualityError
from armor_recipes.evaluation import Evaluation, Measure, Measured, Perplexity, Room, asked
from armor_recipes.evaluation.records import from_record, to_record
from armor_recipes.events import EvaluationFinished, EvaluationProgressed, Observer
from armor_recipes.model.finite import ADVICE, first_broken
from armor_recipes.recipe import Recipe
from armor_recipes.report.measure import Stopwatch
from armor_recipes.report.names import without_folders
from armor_recipes.run.refusals import Refusals
from armor_recipes.session.journal import FRESH, FileJournal, Journal

Measures = Sequence[Measure[Any]]
T = TypeVar("T")

_ADVICE = (
    "Compress less (larger blocks, fewer modules), calibrate on more text that is like it, train with BlockRefineModifier or "
    "DistillationModifier, or raise the bound"
)


def check_measures(recipe: Recipe, model: nn.Module, refused: Refusals) -> None:
    """Note what cannot be measured of such a model, which may be on the meta device."""
    for measure, _ in asked(recipe.evaluation):
        with refused.noted():
            measure.check(model)


Again = Callable[[nn.Module], tuple[Evaluation, ...]]


@contextmanager
def measured(measures: Measures, model: nn.Module, watch: Stopwatch, output: Path, journal: Journal) -> Iterator[Again]:
    """Measure a dense model; what is yielded measures what it has become.

    What has to be kept of the dense model lies in the journal, or in a folder beside `output`, which vanishes at the end of the
    block. What a journal has recorded of the dense model is not measured again.
    """
    if not measures:
        yield lambda _: ()
        return
    with ExitStack() as stack:
        folder = output
        if any(measure.keeps for measure in measures) and leads():
            folder = journal.folder if isinstance(journal, FileJournal) else stack.enter_context(tried(output))
        watch.phase("evaluate before")
        rooms = [_room(measure, folder, watch.observer) for measure in measures]
        pairs = list(zip(measures, rooms, strict=True))
        before = [
            _found(measure.name, measure, partial(measure.before, model, room), model, journal)
            for measure, room in pairs
        ]
        _tell(measures, before, watch.observer, compressed=False)

        def again(changed: nn.Module) -> tuple[Evaluation, ...]:
            watch.phase("evaluate after")
            after: list[Any] = [
                _found(f"{measure.name} after", measure, partial(measure.after, changed, room), changed, journal)
                for measure, room in pairs
            ]
            _tell(measures, after, watch.observer, compressed=True)
            return tuple(Evaluation(one.name, *both) for one, *both in zip(measures, before, after, strict=True))

        yield again


def _tell(measures: Measures, found: Sequence[Measured | None], observer: Observer, *, compressed: bool) -> None:
    for measure, one in zip(measures, found, strict=True):
        if one is not None:
            observer(EvaluationFinished(measure.name, compressed, {value.name: value.value for value in one.values}))


def _found(
    name: str, measure: Measure[Any], take: Callable[[], Measured | None], model: nn.Module, journal: Journal
) -> Measured | None:
    """As it is recorded under that name, else measured and recorded; the journal is rank 0's."""
    own = journal if isinstance(journal, FileJournal) else None
    found = first(lambda: None if own is None else own.evaluation(name))
    if found is not None:
        return recorded(found, Path() if own is None else own.folder)
    there = set(own.folder.iterdir()) if own else set()
    measured = _taken(measure, take, model)
    if own is not None:
        own.record_evaluation(name, to_record(measured), sorted({*own.folder.iterdir()} - there))
    return measured


def _taken(measure: Measure[Any], take: Callable[[], T], model: nn.Module) -> T:
    """What is measured: by all processes of the run together, or by rank 0, which tells the others."""
    if measure.together:
        return taken(take, model)

    def by_one() -> T:
        with alone():
            return taken(take, model)

    return first(by_one)


def recorded(record: Mapping[str, Any], folder: Path) -> Measured | None:
    """What a measure found, from its record in the journal of that folder. Raises CheckpointError where that is none."""
    try:
        return from_record(record["found"])
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: what {record['name']} found is not recorded as this version does ({error!r}): {FRESH}"
        ) from error


def taken(take: Callable[[], T], model: nn.Module) -> T:
    """What is measured; a NumericalError names the first module whose output is not finite, found by taking it again."""
    try:
        return take()
    except NumericalError as error:
        name = first_broken(model, take)
        if not name:
            raise
        raise NumericalError(f"{error}: the output of {name} is the first that is not finite; {ADVICE}") from error


def check_quality(recipe: Recipe, evaluations: Sequence[Evaluation]) -> None:
    """Raise QualityError where a measure is outside the bounds of the recipe's `evaluation`."""
    _check_perplexity(recipe, evaluations)
    _check_divergence(recipe, evaluations)


def _check_divergence(recipe: Recipe, evaluations: Sequence[Evaluation]) -> None:
    """At most `max_kl_divergence`."""
    allowed = None if recipe.evaluation is None else recipe.evaluation.max_kl_divergence
    if allowed is None:
        return
    found = next(each.after for each in evaluations if each.name == "fidelity")
    divergence = next((value for value in found.values if value.name == "kl_divergence"), None)
    if divergence is None:
        raise QualityError("evaluation.max_kl_divergence is a bound on logits, and the model gives none: remove it")
    if divergence.value > allowed:
        raise QualityError(
            f"the KL divergence to the dense model on {' + '.join(map(without_folders, found.datasets))} is {divergence.text()} "
            f"nats a token, and evaluation.max_kl_divergence allows {allowed:g}, however well the layers' own losses did. {_ADVICE}"
        )


def _check_perplexity(recipe: Recipe, evaluations: Sequence[Evaluation]) -> None:
    """At most `max_perplexity_ratio` times as high as before."""
    allowed = None if recipe.evaluation is None else recipe.evaluation.max_perplexity_ratio
    if allowed is None:
        return
    found = next(each for each in evaluations if isinstance(each.after, Perplexity))
    assert isinstance(found.before, Perplexity)
    before, after = found.before.value, found.after.values[0].value
    if after > allowed * before:
        raise QualityError(
            f"perplexity on {without_folders(found.before.dataset)} is {after:.4g} after and {before:.4g} before: "
            f"{after / before:.4g} times as high, and evaluation.max_perplexity_ratio allows {allowed:g}, however well the "
            f"layers' own losses did. {_ADVICE}"
        )


def _room(measure: Measure[Any], folder: Path, observer: Observer) -> Room:
    return Room(folder, lambda done, total: observer(EvaluationProgressed(done, total, measure.name)))
