"""Magnitude pruning: plain 2:4 by the size of the weights alone."""

from armor_recipes.modifiers.magnitude.modifier import MagnitudeConfig, MagnitudeModifier

__all__ = ["MagnitudeConfig", "MagnitudeModifier"]
