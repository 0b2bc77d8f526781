"""The measures of a recipe, taken of the dense model and, once it was changed, of the compressed one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from armor_recipes.checkpoint.staging import tried
from armor_recipes.evaluation import Evaluation, Measure, Room, asked
from armor_recipes.events import EvaluationProgressed, Observer
from armor_recipes.recipe import Recipe
from armor_recipes.report.measure import Stopwatch
from armor_recipes.run.refusals import Refusals

Measures = Sequence[Measure[Any]]


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
        before = [measure.before(model, _room(measure, folder, watch.observer)) for measure in measures]

        def again(changed: nn.Module) -> tuple[Evaluation, ...]:
            watch.phase("evaluate after")
            return tuple(
                Evaluation(measure.name, dense, measure.after(changed, _room(measure, folder, watch.observer)))
                for measure, dense in zip(measures, before, strict=True)
            )

        yield again


def _room(measure: Measure[Any], folder: Path, observer: Observer) -> Room:
    return Room(folder, lambda done, total: observer(EvaluationProgressed(done, total, measure.name)))
