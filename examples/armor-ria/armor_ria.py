"""`RIAModifier`: keep the N largest of every M |W_ij| · (1 / Σ_i |W_ij| + 1 / Σ_j |W_ij|) · (√h_j)^p: a plug-in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from armor_recipes.modifiers import (
    CalibratedConfig,
    Estimate,
    InputSecondMoment,
    Modifier,
    ModuleShape,
    Outcome,
    SolveProgress,
    UnfitError,
    magnitude_mask,
    parse_pattern,
    register,
    relative_loss,
)


class RIAConfig(CalibratedConfig):
    """Prune each targeted weight to N:M by RIA. The weight is saved dense, zeros kept."""

    power: float = Field(
        default=0.5, ge=0, title="Power", description="p: how much the root mean square of a channel's inputs counts."
    )


@register
class RIAModifier(Modifier[RIAConfig]):
    """Plain N:M pruning by relative importance and activations (arXiv 2402.12819)."""

    config_type = RIAConfig
    category: ClassVar[str] = "prune"
    cannot_follow: ClassVar[Mapping[str, str]] = {
        "quantize": "it would put zeros among quantised numbers of whole groups"
    }

    def plan(self, module: ModuleShape) -> Estimate:
        """Any weight whose rows are whole groups will do."""
        group = parse_pattern(self.config.pattern).group
        if module.d_in % group:
            reason = f"{module.name} has {module.d_in} columns, no multiple of {group}"
            raise UnfitError(reason, f"add {module.name!r} to `ignore`")
        entries = module.d_out * module.d_in
        return Estimate(stored_bytes=module.dense_bytes, flops=5.0 * entries, peak_bytes=12 * entries)

    def statistic(self, module: ModuleShape) -> InputSecondMoment:
        """h: the mean of x² over the calibration tokens, `(I,)`."""
        return InputSecondMoment(module.name, module.d_in)

    def solve(
        self, module: ModuleShape, weight: Tensor, statistic: InputSecondMoment, on_progress: SolveProgress | None
    ) -> Outcome:
        """Mask the weight `(O, I)`; kept values are untouched."""
        pattern = parse_pattern(self.config.pattern)
        size = weight.float().abs()
        tiny = torch.finfo(size.dtype).tiny  # a row or column of zeros has no share of importance to give
        share = size / size.sum(0, keepdim=True).clamp(min=tiny) + size / size.sum(1, keepdim=True).clamp(min=tiny)
        scores = share * statistic.value.to(weight.device) ** (self.config.power / 2)
        pruned = weight.float() * magnitude_mask(scores, pattern)
        counts = {"rows_of_zeros": int((size.sum(1) == 0).sum())}
        return Outcome(
            weight=pruned,
            losses=(self.loss(weight, statistic, pruned),),
            stop_reason="closed form",
            counts={name: count for name, count in counts.items() if count},
        )

    def loss(self, weight: Tensor, statistic: InputSecondMoment, approximation: Tensor) -> float:
        """Errors weighted by h, relative to those of Ŵ = 0."""
        return relative_loss(weight, statistic.value.to(weight.device), approximation)
