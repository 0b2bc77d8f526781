"""`MagnitudeModifier`: keep the N entries of each group of M with the largest |W_ij|."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from armor_recipes.calibration.statistics import InputSecondMoment
from armor_recipes.modifiers.pruning import PruningConfig, PruningModifier
from armor_recipes.modifiers.registry import register
from armor_recipes.solver.baselines import magnitude_scores


class MagnitudeConfig(PruningConfig):
    """Prune each targeted weight to N:M by magnitude. The weight is saved dense, zeros kept.

    Calibration text is needed for the reported loss, and for the low-rank correction if there is one.
    """


@register
class MagnitudeModifier(PruningModifier[MagnitudeConfig]):
    """Plain N:M pruning by magnitude. Inputs do not choose the mask, only weigh the loss and the low-rank correction."""

    config_type = MagnitudeConfig

    def prune(self, weight: Tensor, statistic: InputSecondMoment) -> tuple[Tensor, Mapping[str, int]]:  # noqa: ARG002
        """Mask the weight `(O, I)`; kept values are untouched."""
        return weight * self.mask(magnitude_scores(weight)), {}
