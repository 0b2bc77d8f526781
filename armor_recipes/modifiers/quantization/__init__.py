"""Integers for the kept values of S."""

from armor_recipes.modifiers.quantization.modifier import QuantizationConfig, QuantizationModifier

__all__ = ["QuantizationConfig", "QuantizationModifier"]
