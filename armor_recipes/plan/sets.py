"""The calibration sets of a recipe, as estimates of time and memory count them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from armor_recipes.modifiers import AnyModifier
from armor_recipes.modifiers.kinds.contract import Row, calibration_tokens
from armor_recipes.recipe import Recipe
from armor_recipes.recipe.schema import CalibrationSpec


@dataclass(frozen=True, slots=True)
class CalibrationSets:
    """The calibration sets of a recipe: by entry; those that are held as activations, with the model that they are of; and those
    that go through the model and back.
    """

    by_entry: Mapping[str, CalibrationSpec]
    held: Set[tuple[CalibrationSpec, str]]
    back: Set[CalibrationSpec]

    @classmethod
    def of(cls, recipe: Recipe, modifiers: Mapping[str, AnyModifier[Any]], rows: Iterable[Row]) -> CalibrationSets:
        """By what the modifiers need for the rows that they planned."""
        specs = {e.key: e.config.calibration for e in recipe.modifiers if e.config.calibration is not None}
        needs = {key: modifiers[key].needs for key in specs}
        planned: dict[str, list[Row]] = {key: [] for key in specs}
        for row in rows:
            planned.get(row.modifier, []).append(row)
        held: set[tuple[CalibrationSpec, str]] = {
            (specs[key], kind) for key in specs for kind in needs[key].streams_for(planned[key])
        }
        held |= {(specs[key], "inputs of the dense block") for key in specs if needs[key].dense == "block"}
        return cls(specs, held, {specs[key] for key in specs if needs[key].gradients})

    def tokens_of(self, key: str) -> int:
        """Those of an entry; 0 of one that is not calibrated."""
        return calibration_tokens(self.by_entry[key]) if key in self.by_entry else 0

    @property
    def held_tokens(self) -> int:
        """Of all activations that are held at once."""
        return sum(calibration_tokens(spec) for spec, _ in self.held)
