"""`SparseGPTModifier`: column by column, remove what costs least and make up for it in the columns to the right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from armor_recipes.calibration.statistics import InputGram
from armor_recipes.modifiers.base import Estimate, ModuleShape
from armor_recipes.modifiers.pruning import PruningModifier, SparsityConfig
from armor_recipes.modifiers.registry import register
from armor_recipes.solver.baselines import dampen, sparsegpt
from armor_recipes.solver.patterns import Pattern


class SparseGPTConfig(SparsityConfig):
    """Prune each targeted weight by SparseGPT (arXiv 2301.00774). The weight is saved dense, zeros kept.

    Without a pattern the share `sparsity` of each block of columns is pruned, rows compared with one another.
    """

    takes_containers: ClassVar[bool] = True

    block_size: Annotated[int, Field(strict=True, ge=1)] = Field(
        default=128,
        title="Block size",
        description="Columns between two updates of the rest, rounded down to whole groups of the pattern, with which it changes "
        "rounding only. Without a pattern it is what weights are compared in.",
    )
    dampening_frac: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.01,
        title="Damping",
        description="Share of the mean diagonal of H = XXᵀ/n that is added to its diagonal. More of it trusts few "
        "calibration tokens less.",
    )
    preserve_sparsity_mask: Annotated[bool, Field(strict=True)] = Field(
        default=False,
        title="Preserve the mask",
        description="Whether weights that are zero already stay zero and count among the pruned ones; more of them than are to "
        "be pruned are an error.",
    )


@register
class SparseGPTModifier(PruningModifier[SparseGPTConfig]):
    """Plain pruning by SparseGPT (arXiv 2301.00774)."""

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
        return dampen(statistic.value, self.config.dampening_frac)

    def prune(self, weight: Tensor, statistic: InputGram) -> tuple[Tensor, Mapping[str, int]]:
        """Prune the weight `(O, I)`; kept values change."""
        config, pattern = self.config, self.pattern or Pattern(1, 2)
        columns = max(config.block_size // pattern.group, 1) * pattern.group
        pruned, _, counts = sparsegpt(
            weight,
            statistic.value.to(weight.device),
            damping=config.dampening_frac,
            block_columns=columns if self.pattern else config.block_size,
            n_keep=pattern.keep,
            group=pattern.group,
            sparsity=None if self.pattern else config.share,
            keep_zeros=config.preserve_sparsity_mask,
        )
        return pruned, counts
