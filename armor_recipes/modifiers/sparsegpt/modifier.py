"""`SparseGPTModifier`: column by column, remove what costs least and make up for it in the columns to the right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated

from pydantic import Field
from torch import Tensor

from armor_recipes.calibration.statistics import InputGram
from armor_recipes.modifiers.base import Estimate, ModuleShape
from armor_recipes.modifiers.pruning import PruningConfig, PruningModifier
from armor_recipes.modifiers.registry import register
from armor_recipes.solver.baselines import dampen, sparsegpt

#: Columns between two lazy updates of the rest, rounded down to whole groups.
_BLOCK_COLUMNS = 128


class SparseGPTConfig(PruningConfig):
    """Prune each targeted weight to N:M by SparseGPT (arXiv 2301.00774). The weight is saved dense, zeros kept."""

    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.01,
        title="Damping",
        description="Share of the mean diagonal of H = XXᵀ/n that is added to its diagonal. More of it trusts few "
        "calibration tokens less.",
    )


@register
class SparseGPTModifier(PruningModifier[SparseGPTConfig]):
    """Plain N:M pruning by SparseGPT (arXiv 2301.00774)."""

    config_type = SparseGPTConfig

    def plan(self, module: ModuleShape) -> Estimate:
        """As for the other methods, with the factorisation of H and the update of the weight on top."""
        cost = super().plan(module)
        d_out, d_in = module.d_out, module.d_in
        flops = cost.flops + 3.0 * d_in**3 + 2.0 * d_out * d_in**2
        return replace(cost, flops=flops, peak_bytes=cost.peak_bytes + 40 * d_in**2 + 16 * d_out * d_in)

    def statistic(self, module: ModuleShape) -> InputGram:
        """H: the mean of x xᵀ over the calibration tokens, `(I, I)`."""
        return InputGram(module.name, module.d_in)

    def second_moment(self, statistic: InputGram) -> Tensor:
        """The diagonal h `(I,)` of H."""
        return statistic.diagonal

    def adapter_moment(self, statistic: InputGram) -> Tensor:
        """The damped H `(I, I)` that the weight was pruned with."""
        return dampen(statistic.value, self.config.damping)

    def prune(self, weight: Tensor, statistic: InputGram) -> tuple[Tensor, Mapping[str, int]]:
        """Prune the weight `(O, I)`; kept values change."""
        pruned, _, counts = sparsegpt(
            weight,
            statistic.value.to(weight.device),
            damping=self.config.damping,
            block_columns=_BLOCK_COLUMNS // self.pattern.group * self.pattern.group,
            n_keep=self.pattern.keep,
            group=self.pattern.group,
        )
        return pruned, counts
