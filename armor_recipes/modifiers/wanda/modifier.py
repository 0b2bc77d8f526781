"""`WandaModifier`: keep the N entries of each group of M with the largest |W_ij| · √h_j."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from armor_recipes.calibration.statistics import InputSecondMoment
from armor_recipes.modifiers.pruning import PruningConfig, PruningModifier
from armor_recipes.modifiers.registry import register
from armor_recipes.solver.baselines import wanda_scores
from armor_recipes.solver.patterns import magnitude_mask


class WandaConfig(PruningConfig):
    """Prune each targeted weight to N:M by Wanda (arXiv 2306.11695). The weight is saved dense, zeros kept."""


@register
class WandaModifier(PruningModifier[WandaConfig]):
    """Plain N:M pruning by Wanda (arXiv 2306.11695)."""

    config_type = WandaConfig

    def prune(self, weight: Tensor, statistic: InputSecondMoment) -> tuple[Tensor, Mapping[str, int]]:
        """Mask the weight `(O, I)`; kept values are untouched."""
        h = statistic.value.to(weight.device)
        dead = int((h == 0).sum())
        return weight * magnitude_mask(wanda_scores(weight, h), self.pattern), {"dead_channels": dead} if dead else {}
