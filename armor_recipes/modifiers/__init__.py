"""Methods that change linear modules: one folder each, a registry, and the contract in `base`."""

from armor_recipes.modifiers.base import (
    AnyModifier,
    Estimate,
    FactorModifier,
    Modifier,
    ModuleShape,
    Outcome,
    Rearranger,
    Refiner,
    Statistic,
)
from armor_recipes.modifiers.registry import config_types, modifiers, register

__all__ = [
    "AnyModifier",
    "Estimate",
    "FactorModifier",
    "Modifier",
    "ModuleShape",
    "Outcome",
    "Rearranger",
    "Refiner",
    "Statistic",
    "config_types",
    "modifiers",
    "register",
]
