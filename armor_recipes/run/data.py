"""The data that a recipe names, as inputs of the model: read before any weight is, so that what is wrong with it is told first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from armor_recipes.calibration.inputs import InputSet
from armor_recipes.calibration.tokens import build_inputs
from armor_recipes.evaluation import Measure, Reading, asked
from armor_recipes.integrations.models import ModelSource, load_processor
from armor_recipes.model.facts import class_numbers
from armor_recipes.model.inputs import model_inputs
from armor_recipes.modifiers import AnyModifier
from armor_recipes.recipe import ModifierEntry, Recipe
from armor_recipes.recipe.schema import CalibrationSpec, InputsSpec, datasets_of
from armor_recipes.run.evaluating import Measures
from armor_recipes.run.refusals import Refusals


@dataclass(frozen=True, slots=True)
class Data:
    """Calibration samples by their spec, and the measures of the evaluation with their data."""

    tokens: Mapping[CalibrationSpec, InputSet]
    measures: Measures = ()


def read_data(
    recipe: Recipe,
    source: ModelSource,
    shapes: PreTrainedModel,
    modifiers: Mapping[str, AnyModifier[Any]],
    tokenizer: Any | None,
    refused: Refusals,
    *,
    wanted: Callable[[str], bool] = lambda _: True,
) -> Data:
    """Read the datasets that are `wanted`, by name; each modifier is asked whether the samples that came are enough for it.

    `shapes` is the model on the meta device. What is wrong is noted in `refused`.
    """
    inputs, processor = model_inputs(shapes), partial(load_processor, source)

    def samples(spec: InputsSpec) -> InputSet:
        return build_inputs(spec, inputs, tokenizer=tokenizer, processor=processor)

    tokens: dict[CalibrationSpec, InputSet] = {}
    for spec, entries in _by_calibration(recipe).items():
        if all(map(wanted, spec.datasets)):
            with refused.noted():
                tokens[spec] = samples(spec)
        for entry in entries if spec in tokens else ():
            with refused.noted(f"{entry.where}: {entry.name}"):
                modifiers[entry.key].check_windows(tokens[spec].origins)
    reading = Reading(tokenizer, inputs, samples, class_numbers(source.config), processor)
    measures: list[Measure[Any]] = []
    for measure, spec in asked(recipe.evaluation):
        if all(map(wanted, datasets_of(spec))):
            with refused.noted():
                measures.append(measure.read(spec, reading))
    return Data(tokens, measures)


def _by_calibration(recipe: Recipe) -> dict[CalibrationSpec, list[ModifierEntry]]:
    found: dict[CalibrationSpec, list[ModifierEntry]] = {}
    for entry in recipe.modifiers:
        if entry.config.calibration is not None:
            found.setdefault(entry.config.calibration, []).append(entry)
    if recipe.steps and recipe.calibration is not None:  # what llm-compressor's modifiers are given
        found.setdefault(recipe.calibration, [])
    return found
