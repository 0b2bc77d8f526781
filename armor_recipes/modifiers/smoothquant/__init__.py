"""SmoothQuant: activations with less outliers, for weights with a few more (arXiv 2211.10438)."""

from armor_recipes.modifiers.smoothquant.modifier import SmoothQuantConfig, SmoothQuantModifier

__all__ = ["SmoothQuantConfig", "SmoothQuantModifier"]
