"""SparseGPT: plain pruning in which kept weights make up for removed ones (arXiv 2301.00774)."""

from armor_recipes.modifiers.sparsegpt.modifier import SparseGPTConfig, SparseGPTModifier

__all__ = ["SparseGPTConfig", "SparseGPTModifier"]
