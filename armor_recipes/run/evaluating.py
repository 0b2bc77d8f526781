"""The measures of a recipe, taken of the dense model and, once it was changed, of the compressed one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from armor_recipes.checkpoint.staging import tried
from armor_recipes.errors import NumericalError
from armor_recipes.evaluation import Evaluation, Measure, Room, asked
from armor_recipes.events import EvaluationProgressed, Observer
from armor_recipes.model.finite import ADVICE, first_broken
from armor_recipes.recipe import Recipe
from armor_recipes.report.measure import Stopwatch
from armor_recipes.run.refusals import Refusals

Measures = Sequence[Measure[Any]]
T = TypeVar("T")


def check_measures(recipe: Recipe, model: nn.Module, refused: Refusals) -> None:
    """Note what cannot be measured of such a model, which may be on the meta device."""
    for measure, _ in asked(recipe.evaluation):
        with refused.noted():
            measure.check(model)


Again = Callable[[nn.Module], tuple[Evaluation, ...]]


@contextmanager
def measured(measures: Measures, model: nn.Module, watch: Stopwatch, output: Path) -> Iterator[Again]:
    """Measure a dense model; what is yielded measures what it has become.

    What has to be kept of the dense model lies in a folder beside `output`, which vanishes at the end of the block.
    """
    if not measures:
        yield lambda _: ()
        return
    with ExitStack() as stack:
        keeps = any(measure.keeps for measure in measures)
        folder = stack.enter_context(tried(output)) if keeps else output
        watch.phase("evaluate before")
        rooms = [_room(measure, folder, watch.observer) for measure in measures]
        pairs = list(zip(measures, rooms, strict=True))
        before = [taken(partial(measure.before, model, room), model) for measure, room in pairs]

        def again(changed: nn.Module) -> tuple[Evaluation, ...]:
            watch.phase("evaluate after")
            return tuple(
                Evaluation(measure.name, dense, taken(partial(measure.after, changed, room), changed))
                for (measure, room), dense in zip(pairs, before, strict=True)
            )

        yield again


def taken(take: Callable[[], T], model: nn.Module) -> T:
    """What is measured; a NumericalError names the first module whose output is not finite, found by taking it again."""
    try:
        return take()
    except NumericalError as error:
        name = first_broken(model, take)
        if not name:
            raise
        raise NumericalError(f"{error}: the output of {name} is the first that is not finite; {ADVICE}") from error


def _room(measure: Measure[Any], folder: Path, observer: Observer) -> Room:
    return Room(folder, lambda done, total: observer(EvaluationProgressed(done, total, measure.name)))
