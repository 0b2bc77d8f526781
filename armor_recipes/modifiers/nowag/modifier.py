"""`NoWagModifier`: keep the two entries of each group of four with the largest W̄²_ij · h_j, and nothing else."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from armor_recipes.calibration.statistics import InputSecondMoment
from armor_recipes.errors import PlanError
from armor_recipes.modifiers.base import CalibratedConfig, Estimate, Modifier, ModuleShape, Outcome, SolveProgress
from armor_recipes.modifiers.registry import register
from armor_recipes.solver import nowag_mask, relative_loss


class NoWagConfig(CalibratedConfig):
    """Prune each targeted weight to 2:4 by NoWag-P. The weight is saved dense, zeros kept."""


@register
class NoWagModifier(Modifier[NoWagConfig]):
    """Plain 2:4 pruning by NoWag-P: ARMOR's starting point, without its factors."""

    config_type = NoWagConfig
    category: ClassVar[str] = "prune"

    def plan(self, module: ModuleShape) -> Estimate:
        """Any weight whose rows are a multiple of 4 long will do."""
        if module.d_in % 4:
            raise PlanError(
                f"2:4 needs rows of a multiple of 4 entries, {module.name} has {module.d_in}: add {module.name!r} to `ignore`"
            )
        entries = module.d_out * module.d_in
        return Estimate(stored_bytes=module.dense_bytes, flops=20.0 * entries, peak_bytes=16 * entries)

    def statistic(self, module: ModuleShape) -> InputSecondMoment:
        """h: the mean of x² over the calibration tokens, `(I,)`."""
        return InputSecondMoment(module.name, module.d_in)

    def solve(
        self, module: ModuleShape, weight: Tensor, statistic: InputSecondMoment, on_progress: SolveProgress | None
    ) -> Outcome:
        """Mask the weight `(O, I)`; kept values are untouched."""
        mask, counts = nowag_mask(weight, statistic.value.to(weight.device))
        pruned = weight.float() * mask
        return Outcome(
            weight=pruned, losses=(self.loss(weight, statistic, pruned),), stop_reason="closed form", counts=counts
        )

    def loss(self, weight: Tensor, statistic: InputSecondMoment, approximation: Tensor) -> float:
        """The `diagonal` objective relative to Ŵ = 0."""
        return relative_loss(weight, statistic.value.to(weight.device), approximation)
