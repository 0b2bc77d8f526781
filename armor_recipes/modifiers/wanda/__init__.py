"""Wanda: plain 2:4 pruning by weight and activation (arXiv 2306.11695)."""

from armor_recipes.modifiers.wanda.modifier import WandaConfig, WandaModifier

__all__ = ["WandaConfig", "WandaModifier"]
