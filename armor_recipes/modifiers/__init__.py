"""Methods that change linear modules: one folder each, a registry, and the contract in `base`."""

from armor_recipes.modifiers.base import Estimate, Modifier, ModuleShape, Outcome, Statistic
from armor_recipes.modifiers.registry import config_types, modifiers, register

__all__ = ["Estimate", "Modifier", "ModuleShape", "Outcome", "Statistic", "config_types", "modifiers", "register"]
