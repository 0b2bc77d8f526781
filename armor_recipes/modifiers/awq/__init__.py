"""AWQ: channels that matter are scaled up before weights are quantised (arXiv 2306.00978)."""

from armor_recipes.modifiers.awq.modifier import AWQConfig, AWQModifier

__all__ = ["AWQConfig", "AWQModifier"]
