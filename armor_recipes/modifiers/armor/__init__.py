"""ARMOR: Ŵ = A · S · B with an N:M core S and block-diagonal A and B (arXiv 2510.05528)."""

from armor_recipes.modifiers.armor.config import ARMORConfig
from armor_recipes.modifiers.armor.modifier import ARMORModifier

__all__ = ["ARMORConfig", "ARMORModifier"]
