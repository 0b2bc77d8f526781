"""Wanda: plain pruning by weight and activation (arXiv 2306.11695)."""

from armor_recipes.modifiers.wanda.modifier import WandaPruningConfig, WandaPruningModifier

__all__ = ["WandaPruningConfig", "WandaPruningModifier"]
