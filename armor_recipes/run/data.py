"""The data that a recipe names, as inputs of the model: read before any weight is, so that what is wrong with it is told first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from armor_recipes.calibration.inputs import InputSet, ModelInputs
from armor_recipes.calibration.tokens import build_inputs
from armor_recipes.evaluation.perplexity import evaluation_windows
from armor_recipes.modifiers import AnyModifier
from armor_recipes.recipe import ModifierEntry, Recipe
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.run.refusals import Refusals


@dataclass(frozen=True, slots=True)
class Data:
    """Calibration samples by their spec, and those that perplexity is measured on, where it is."""

    tokens: Mapping[CalibrationSpec, InputSet]
    held_out: InputSet | None


def read_data(
    recipe: Recipe,
    modifiers: Mapping[str, AnyModifier[Any]],
    inputs: ModelInputs,
    tokenizer: Any | None,
    refused: Refusals,
    *,
    wanted: Callable[[str], bool] = lambda _: True,
) -> Data:
    """Read the datasets that are `wanted`, by name; each modifier is asked whether the samples that came are enough for it.

    What is wrong is noted in `refused`.
    """
    tokens: dict[CalibrationSpec, InputSet] = {}
    for spec, entries in _by_calibration(recipe).items():
        if all(map(wanted, spec.datasets)):
            with refused.noted():
                tokens[spec] = build_inputs(spec, inputs, tokenizer=tokenizer)
        for entry in entries if spec in tokens else ():
            with refused.noted(f"{entry.where}: {entry.name}"):
                modifiers[entry.key].check_windows(tokens[spec].origins)
    held_out = None
    if recipe.evaluation is not None and wanted(recipe.evaluation.perplexity.dataset):
        with refused.noted():
            held_out = evaluation_windows(recipe.evaluation.perplexity, tokenizer, vocab_size=inputs.vocabulary)
    return Data(tokens, held_out)


def _by_calibration(recipe: Recipe) -> dict[CalibrationSpec, list[ModifierEntry]]:
    found: dict[CalibrationSpec, list[ModifierEntry]] = {}
    for entry in recipe.modifiers:
        if entry.config.calibration is not None:
            found.setdefault(entry.config.calibration, []).append(entry)
    return found
