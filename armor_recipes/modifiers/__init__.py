"""Methods that change linear modules: one folder each, a registry, the contract in `base`, and a file for each kind in `kinds`.

What a method of one's own needs is here; CONTRIBUTING.md has two whole ones.
"""

from armor_recipes.modifiers.base import (
    AnyModifier,
    CalibratedConfig,
    Estimate,
    ModuleShape,
    Needs,
    SolveProgress,
    Statistic,
)
from armor_recipes.modifiers.kinds.factor import FactorModifier, FactorOutcome
from armor_recipes.modifiers.kinds.module import Modifier, Outcome
from armor_recipes.modifiers.kinds.rearranger import Chain, Rearrangement, Rearranger
from armor_recipes.modifiers.kinds.refiner import RefineOutcome, Refiner, RefineTask, RefineUnit, UnitOutput
from armor_recipes.modifiers.registry import config_types, modifiers, register

__all__ = [
    "AnyModifier",
    "CalibratedConfig",
    "Chain",
    "Estimate",
    "FactorModifier",
    "FactorOutcome",
    "Modifier",
    "ModuleShape",
    "Needs",
    "Outcome",
    "Rearrangement",
    "Rearranger",
    "RefineOutcome",
    "RefineTask",
    "RefineUnit",
    "Refiner",
    "SolveProgress",
    "Statistic",
    "UnitOutput",
    "config_types",
    "modifiers",
    "register",
]
