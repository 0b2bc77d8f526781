"""GPTQ: rounding in which later columns make up for the errors of earlier ones (arXiv 2210.17323)."""

from armor_recipes.modifiers.gptq.modifier import GPTQConfig, GPTQModifier

__all__ = ["GPTQConfig", "GPTQModifier"]
