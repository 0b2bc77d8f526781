"""What the plain N:M methods share: the dense weight that is saved, the loss that is reported, the low-rank correction."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import Field
from torch import Tensor

from armor_recipes.calibration.statistics import InputSecondMoment
from armor_recipes.errors import UnfitError
from armor_recipes.modifiers.base import UNROUNDED, CalibratedConfig, Estimate, ModuleShape, SolveProgress
from armor_recipes.modifiers.kinds.module import Modifier, Outcome
from armor_recipes.solver import relative_loss
from armor_recipes.solver.baselines import adapter_rank, low_rank_adapter
from armor_recipes.solver.entry import checked_finite
from armor_recipes.solver.patterns import Pattern, parse_pattern


class PruningConfig(CalibratedConfig):
    """Fields of every plain N:M method."""

    adapter_block: Annotated[int, Field(strict=True, ge=0)] = Field(
        default=0,
        title="Low-rank correction",
        description="Adds after pruning the best low-rank correction with as many values as ARMOR's A and B of this block "
        "size (that is its rank). It is folded into the saved weight, which then has no zeros. 0 adds none.",
    )


C = TypeVar("C", bound=PruningConfig)


class PruningModifier(Modifier[C]):
    """A method that keeps N of every M weights and stores no factors. Subclasses say how in `prune`."""

    category: ClassVar[str] = "prune"
    cannot_follow: ClassVar[Mapping[str, str]] = {"quantize": UNROUNDED}

    @property
    def pattern(self) -> Pattern:
        """The sparsity pattern."""
        return parse_pattern(self.config.pattern)

    @abstractmethod
    def prune(self, weight: Tensor, statistic: Any) -> tuple[Tensor, Mapping[str, int]]:
        """The pruned weight `(O, I)`, float32 as the finite `weight` is, and counts of what was out of the ordinary."""

    def plan(self, module: ModuleShape) -> Estimate:
        """Any weight whose rows are whole groups will do."""
        group = self.pattern.group
        if module.d_in % group:
            raise UnfitError(
                f"{self.pattern} needs rows of a multiple of {group} entries, {module.name} has {module.d_in}",
                f"add {module.name!r} to `ignore`",
            )
        entries = module.d_out * module.d_in
        flops, peak_bytes = 20.0 * entries, 16 * entries
        if self.config.adapter_block:
            side = min(module.d_out, module.d_in)
            flops += 6.0 * entries * side + 10.0 * side**3
            peak_bytes = 48 * entries
        return Estimate(stored_bytes=module.dense_bytes, flops=flops, peak_bytes=peak_bytes)

    def statistic(self, module: ModuleShape) -> Any:
        """h: the mean of x² over the calibration tokens, `(I,)`."""
        return InputSecondMoment(module.name, module.d_in)

    def second_moment(self, statistic: Any) -> Tensor:
        """The second moment h `(I,)`, from what `statistic` made."""
        value: Tensor = statistic.value
        return value

    def adapter_moment(self, statistic: Any) -> Tensor:
        """What weighs the errors of the low-rank correction: h `(I,)` or H `(I, I)`."""
        return self.second_moment(statistic)

    def solve(
        self,
        module: ModuleShape,
        weight: Tensor,
        statistic: Any,
        on_progress: SolveProgress | None,  # noqa: ARG002 - done in one step
    ) -> Outcome:
        """Prune the weight `(O, I)`, and add the low-rank correction if there is one."""
        raw = checked_finite(weight.float())
        pruned, counts = self.prune(raw, statistic)
        rank = self.rank(module)
        if rank:
            left, right = low_rank_adapter(raw, pruned, self.adapter_moment(statistic).to(raw.device), rank=rank)
            pruned = pruned + left @ right
        return Outcome(
            weight=pruned, losses=(self.loss(weight, statistic, pruned),), stop_reason="closed form", counts=counts
        )

    def loss(self, weight: Tensor, statistic: Any, approximation: Tensor) -> float:
        """The `diagonal` objective relative to Ŵ = 0."""
        return relative_loss(weight, self.second_moment(statistic).to(weight.device), approximation)

    def rank(self, module: ModuleShape) -> int:
        """Rank of the low-rank correction; 0 for none."""
        values = self.config.adapter_block * (module.d_out + module.d_in)
        return adapter_rank(module.d_out, module.d_in, values)
