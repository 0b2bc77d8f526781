"""Channel permutation: reorder hidden channels before pruning."""

from armor_recipes.modifiers.permutation.modifier import ChannelPermutationConfig, ChannelPermutationModifier

__all__ = ["ChannelPermutationConfig", "ChannelPermutationModifier"]
