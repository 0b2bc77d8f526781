"""NoWag-P: plain 2:4 pruning by the normalised weight's share of the loss; no factors."""

from armor_recipes.modifiers.nowag.modifier import NoWagConfig, NoWagModifier

__all__ = ["NoWagConfig", "NoWagModifier"]
