"""`NoWagModifier`: keep the N entries of each group of M with the largest W̄²_ij · h_j, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from armor_recipes.calibration.statistics import InputSecondMoment
from armor_recipes.modifiers.pruning import PruningConfig, PruningModifier
from armor_recipes.modifiers.registry import register
from armor_recipes.solver import nowag_mask


class NoWagConfig(PruningConfig):
    """Prune each targeted weight to N:M by NoWag-P. The weight is saved dense, zeros kept."""


@register
class NoWagModifier(PruningModifier[NoWagConfig]):
    """Plain N:M pruning by NoWag-P: ARMOR's starting point, without its factors."""

    config_type = NoWagConfig

    def prune(self, weight: Tensor, statistic: InputSecondMoment) -> tuple[Tensor, Mapping[str, int]]:
        """Mask the weight `(O, I)`; kept values are untouched."""
        mask, counts = nowag_mask(weight, statistic.value.to(weight.device), pattern=self.config.pattern)
        return weight * mask, counts
