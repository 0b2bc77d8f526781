"""Training of all factors at once against the dense model's next-token probabilities."""

from armor_recipes.modifiers.distillation.modifier import DistillationConfig, DistillationModifier

__all__ = ["DistillationConfig", "DistillationModifier"]
