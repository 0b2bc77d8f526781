"""Training of a decoder layer's factors against the dense layer's output."""

from armor_recipes.modifiers.block_refine.modifier import BlockRefineConfig, BlockRefineModifier

__all__ = ["BlockRefineConfig", "BlockRefineModifier"]
