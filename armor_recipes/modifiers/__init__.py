"""Methods that change linear modules: one folder each, a registry, the contract in `base`, and a file for each kind in `kinds`.

What a method of one's own needs is here, errors, statistics and maths of lower rooms included: a plug-in imports this module and no
other. docs/how-to/modifier.md has two whole methods, `examples/armor-ria` is a whole package.
"""

from armor_recipes.calibration.split import SplitGram
from armor_recipes.calibration.statistics import InputGram, InputSecondMoment
from armor_recipes.errors import NumericalError, PlanError, UnfitError
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
from armor_recipes.modifiers.kinds.quantizer import QuantizedOutcome, Quantizer
from armor_recipes.modifiers.kinds.rearranger import Chain, Rearrangement, Rearranger
from armor_recipes.modifiers.kinds.refiner import RefineOutcome, Refiner, RefineTask, RefineUnit, UnitOutput
from armor_recipes.modifiers.kinds.smoother import Smoother
from armor_recipes.modifiers.registry import config_types, modifiers, register
from armor_recipes.modifiers.seeding import module_seed
from armor_recipes.modifiers.training import RefineConfig, TrainingRefiner
from armor_recipes.recipe.schema import ModifierConfig
from armor_recipes.solver import relative_loss
from armor_recipes.solver.patterns import magnitude_mask, parse_pattern

__all__ = [
    "AnyModifier",
    "CalibratedConfig",
    "Chain",
    "Estimate",
    "FactorModifier",
    "FactorOutcome",
    "InputGram",
    "InputSecondMoment",
    "Modifier",
    "ModifierConfig",
    "ModuleShape",
    "Needs",
    "NumericalError",
    "Outcome",
    "PlanError",
    "QuantizedOutcome",
    "Quantizer",
    "Rearrangement",
    "Rearranger",
    "RefineConfig",
    "RefineOutcome",
    "RefineTask",
    "RefineUnit",
    "Refiner",
    "Smoother",
    "SolveProgress",
    "SplitGram",
    "Statistic",
    "TrainingRefiner",
    "UnfitError",
    "UnitOutput",
    "config_types",
    "magnitude_mask",
    "modifiers",
    "module_seed",
    "parse_pattern",
    "register",
    "relative_loss",
]
