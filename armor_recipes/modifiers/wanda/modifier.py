"""`WandaPruningModifier`: keep the N entries of each group of M with the largest |W_ij| · √h_j, or a share of each row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor

from armor_recipes.calibration.statistics import InputSecondMoment
from armor_recipes.modifiers.pruning import PruningModifier, SparsityConfig
from armor_recipes.modifiers.registry import register
from armor_recipes.solver.baselines import wanda_scores


class WandaPruningConfig(SparsityConfig):
    """Prune each targeted weight by Wanda (arXiv 2306.11695). The weight is saved dense, zeros kept.

    Without a pattern the share `sparsity` of each row is pruned.
    """

    takes_containers: ClassVar[bool] = True


@register
class WandaPruningModifier(PruningModifier[WandaPruningConfig]):
    """Plain pruning by Wanda (arXiv 2306.11695)."""

    config_type = WandaPruningConfig

    def prune(self, weight: Tensor, statistic: InputSecondMoment) -> tuple[Tensor, Mapping[str, int]]:
        """Mask the weight `(O, I)`; kept values are untouched."""
        h = statistic.value.to(weight.device)
        dead = int((h == 0).sum())
        return weight * self.mask(wanda_scores(weight, h)), {"dead_channels": dead} if dead else {}
