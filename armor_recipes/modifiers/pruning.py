"""What the plain pruning methods share: the dense weight that is saved, the loss that is reported, the low-rank correction."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Self, TypeVar

from pydantic import AfterValidator, Field, model_validator
from torch import Tensor

from armor_recipes.calibration.statistics import InputSecondMoment
from armor_recipes.errors import UnfitError
from armor_recipes.modifiers.base import (
    UNROUNDED,
    CalibratedConfig,
    Estimate,
    ModuleShape,
    SolveProgress,
    SparsityPattern,
)
from armor_recipes.modifiers.kinds.module import Modifier, Outcome
from armor_recipes.solver import relative_loss
from armor_recipes.solver.baselines import adapter_rank, low_rank_adapter, unstructured_mask
from armor_recipes.solver.entry import checked_finite
from armor_recipes.solver.patterns import Pattern, magnitude_mask, parse_pattern


class PruningConfig(CalibratedConfig):
    """Fields of every plain N:M method."""

    adapter_block: Annotated[int, Field(strict=True, ge=0)] = Field(
        default=0,
        title="Low-rank correction",
        description="Adds after pruning the best low-rank correction with as many values as ARMOR's A and B of this block "
        "size (that is its rank). It is folded into the saved weight, which then has no zeros. 0 adds none.",
    )

    @property
    def kept(self) -> Pattern | None:
        """N kept of M; None where any weights are pruned."""
        return parse_pattern(self.pattern)

    @property
    def share(self) -> float:
        """The share of the weights that is pruned where there is no pattern; 0 where there is one."""
        return 0.0


def _structure(text: str) -> str:
    """llm-compressor's N:M, N pruned of M, in its plain form; 0:0 for none. Raises ValueError where it is neither."""
    found = re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", text)
    if found is None:
        raise ValueError(
            f"mask_structure={text!r} is not of the form N:M (prune N of every M entries), such as 2:4, or 0:0"
        )
    pruned, group = int(found[1]), int(found[2])
    if pruned or group:
        Pattern(group - pruned, group)
    return f"{pruned}:{group}"


MaskStructure = Annotated[
    str, AfterValidator(_structure), Field(json_schema_extra={"pattern": "^[0-9]{1,2}:[0-9]{1,2}$"})
]
_BOTH_WORDS = (
    "`pattern` counts what is kept (1:4 keeps one of four), llm-compressor's `mask_structure` what is pruned (1:4 keeps three of "
    'four; "0:0" with `sparsity: 0.5` prunes half of the weights without a pattern)'
)
#: How far `sparsity` may be from that of the pattern: two digits, as people write a third.
_ROUNDED = 0.005


class SparsityConfig(PruningConfig):
    """Fields of the methods that llm-compressor has, too: our words, or its own, never both."""

    pattern: SparsityPattern | None = Field(  # type: ignore[assignment]  # without a default of its own here
        default=None,
        title="Sparsity pattern",
        description="`N:M`: N kept values in every M consecutive entries of a row, M at most 32 and a divisor of the row's "
        "length. Either this or `mask_structure`.",
    )
    mask_structure: MaskStructure | None = Field(
        default=None,
        title="Mask structure",
        description="llm-compressor's `N:M`: N **pruned** values in every M consecutive entries of a row; `0:0`, for which "
        "`sparsity` alone stands, too: none, any weights are pruned.",
    )
    sparsity: Annotated[float, Field(gt=0, lt=1, allow_inf_nan=False)] | None = Field(
        default=None,
        title="Sparsity",
        description="Share of the weights to prune where they have no pattern; beside a pattern it may only say the same.",
    )

    @model_validator(mode="after")
    def _check_sparsity(self) -> Self:
        given = [name for name in ("pattern", "mask_structure") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"give either `pattern` or `mask_structure`: {_BOTH_WORDS}")
        if not given and self.sparsity is None:
            raise ValueError(f"give `pattern` or `mask_structure`: {_BOTH_WORDS}")
        kept = self.kept
        if kept is None and self.sparsity is None:
            raise ValueError(
                'mask_structure: "0:0" prunes any weights; say how many of them with `sparsity`, such as 0.5'
            )
        if kept is not None and self.sparsity is not None and abs(self.sparsity - kept.sparsity) > _ROUNDED:
            raise ValueError(
                f"sparsity: {self.sparsity:g} contradicts {given[0]}: {getattr(self, given[0])}, which prunes "
                f"{100 * kept.sparsity:.3g} % of the weights: correct one, or leave `sparsity` out"
            )
        return self

    @property
    def kept(self) -> Pattern | None:
        """N kept of M; None where any weights are pruned."""
        if self.pattern is not None:
            return parse_pattern(self.pattern)
        if self.mask_structure in (None, "0:0"):
            return None
        pruned = parse_pattern(str(self.mask_structure))
        return Pattern(pruned.group - pruned.keep, pruned.group)

    @property
    def share(self) -> float:
        """`sparsity`, where there is no pattern."""
        return self.sparsity or 0.0


C = TypeVar("C", bound=PruningConfig)


class PruningModifier(Modifier[C]):
    """A method that keeps N of every M weights and stores no factors. Subclasses say how in `prune`."""

    category: ClassVar[str] = "prune"
    cannot_follow: ClassVar[Mapping[str, str]] = {"quantize": UNROUNDED}

    @property
    def pattern(self) -> Pattern | None:
        """The sparsity pattern; None where any weights are pruned."""
        return self.config.kept

    @property
    def sparsity(self) -> str | None:
        """The pattern as text."""
        return None if self.pattern is None else str(self.pattern)

    def mask(self, scores: Tensor) -> Tensor:
        """What to keep, bool `(O, I)`: the largest scores of each group, or of each row where there is no pattern."""
        pattern = self.pattern
        return unstructured_mask(scores, self.config.share) if pattern is None else magnitude_mask(scores, pattern)

    @abstractmethod
    def prune(self, weight: Tensor, statistic: Any) -> tuple[Tensor, Mapping[str, int]]:
        """The pruned weight `(O, I)`, float32 as the finite `weight` is, and counts of what was out of the ordinary."""

    def plan(self, module: ModuleShape) -> Estimate:
        """Any weight whose rows are whole groups will do."""
        if self.pattern is not None and module.d_in % self.pattern.group:
            raise UnfitError(
                f"{self.pattern} needs rows of a multiple of {self.pattern.group} entries, {module.name} has {module.d_in}",
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
