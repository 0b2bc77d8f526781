"""`QuantizationModifier`: int8 or int4 for the kept values of S, and A and B re-solved around them."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from armor_recipes.calibration.statistics import InputGram, InputSecondMoment
from armor_recipes.errors import UnfitError
from armor_recipes.modifiers.base import Estimate, ModuleShape, SolveProgress
from armor_recipes.modifiers.kinds.factor import FactorModifier, FactorOutcome
from armor_recipes.modifiers.registry import register
from armor_recipes.recipe.schema import ModifierConfig
from armor_recipes.solver.hessian import hessian_loss, regularize
from armor_recipes.solver.normalize import relative_loss
from armor_recipes.solver.quantize import Rounding, requantize
from armor_recipes.solver.result import SparseFactors

#: Products of (O, I) with a block-diagonal factor in one cycle of A and B.
_PRODUCTS = 8
#: Working copies of an (O, I) float32 matrix that a change holds at its peak.
_WORKING_COPIES = 12


class QuantizationConfig(ModifierConfig):
    """Store the kept values of S as int8 or int4, and re-solve A and B around them."""

    needs_calibration: ClassVar[bool] = True

    num_bits: Literal[8, 4] = Field(
        default=8, title="Bits", description="Of a kept value: 8 (integers from -127 to 127) or 4 (from -8 to 7)."
    )
    strategy: Literal["channel", "group"] = Field(
        default="channel",
        title="Strategy",
        description="What has one scale: `channel`, the kept values of a row; `group`, each `group_size` of them.",
    )
    group_size: Annotated[int, Field(strict=True, ge=8, multiple_of=8)] | None = Field(
        default=None,
        title="Group size",
        description="`group`: kept values that have one scale, a multiple of 8. They are counted along the packed row, where two "
        "of every four columns remain: 32 kept values stand for 64 columns.",
    )
    resolve: Annotated[bool, Field(strict=True)] = Field(
        default=True,
        title="Re-solve A and B",
        description="Solve A and B again around the integers, so that the product comes closer to what it was; false leaves them.",
    )
    iterations: Annotated[int, Field(strict=True, ge=1)] = Field(
        default=10,
        title="Iterations",
        description="Cycles of A and B at most; fewer where the last gained less than 0.1 %.",
    )
    objective: Literal["diagonal", "hessian"] = Field(
        default="diagonal",
        title="Objective",
        description="How errors of the product are weighted: `diagonal`, by the mean square of their input channel; `hessian`, "
        "by correlations between input channels, too.",
    )
    shrinkage: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.5, title="Shrinkage", description="`hessian`: share by which correlations are shrunk to zero."
    )
    damping: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.01,
        title="Damping",
        description="`hessian`: share of the mean square input that is added to every channel's.",
    )
    rounding: Rounding = Field(
        default="nearest",
        title="Rounding",
        description="`nearest`; or `gptq`, which moves the error of each kept value to the later ones of its row. It goes with "
        "`objective: hessian`, keeps masks, and costs (I/2)^3 operations for each row of the weight.",
    )

    @model_validator(mode="after")
    def _check_fields(self) -> QuantizationConfig:
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError("strategy: group goes with a group_size, strategy: channel without one")
        if self.rounding == "gptq" and self.objective != "hessian":
            raise ValueError("rounding: gptq goes with objective: hessian, whose correlations it needs")
        return self


@register
class QuantizationModifier(FactorModifier[QuantizationConfig]):
    """Quantises the core of factors that were made before, around the product that they give."""

    config_type = QuantizationConfig
    category: ClassVar[str] = "quantize"

    def plan(self, module: ModuleShape, block_size: tuple[int, int]) -> Estimate:
        """Check that groups are whole; PlanError names what to do."""
        config, (b_o, b_i) = self.config, block_size
        kept = module.d_in // 2
        if config.num_bits == 4 and kept % 8:
            raise UnfitError(
                f"int4 needs rows of a multiple of 16 entries, {module.name} has {module.d_in}",
                f"set num_bits: 8, or add {module.name!r} to `ignore`",
            )
        group = config.group_size or kept
        if kept % group:
            sizes = [size for size in range(8, kept + 1, 8) if kept % size == 0]
            raise UnfitError(
                f"group_size {group} does not divide the {kept} kept values in a row of {module.name}",
                f"sizes that fit: {sizes}, or strategy: channel",
            )
        entries = module.d_out * module.d_in
        factor_bytes = (module.d_out * b_o + module.d_in * b_i) * module.itemsize
        scale_bytes = module.d_out * (kept // group) * module.itemsize
        core_bytes = entries // 2 * config.num_bits // 8 + entries // 8 + scale_bytes
        cycles = config.iterations if config.resolve else 0
        flops = 60.0 * entries + 1.0 * cycles * _PRODUCTS * entries * (b_o + b_i)
        if config.objective == "hessian":
            flops += 4.0 * cycles * entries * module.d_in
        if config.rounding == "gptq":
            flops += 2.0 * module.d_out * kept**3
        return Estimate(
            stored_bytes=core_bytes + factor_bytes,
            factor_bytes=factor_bytes,
            block_size=block_size,
            flops=flops,
            peak_bytes=_WORKING_COPIES * entries * 4,
            stored_as="packed",
            core="int8" if config.num_bits == 8 else "int4",
            group_size=None if group == kept else group,
        )

    def statistic(self, module: ModuleShape) -> InputSecondMoment | InputGram:
        """h: the mean of x² over the calibration tokens, `(I,)`; or the means of all products of two channels."""
        kind = InputGram if self.config.objective == "hessian" else InputSecondMoment
        return kind(module.name, module.d_in)

    def change(
        self,
        module: ModuleShape,  # noqa: ARG002 - nothing depends on the name
        factors: SparseFactors,
        statistic: InputSecondMoment | InputGram,
        on_progress: SolveProgress | None,
    ) -> FactorOutcome:
        """Quantise the core, and re-solve A and B."""
        config, (h, gram) = self.config, self._moments(statistic, factors.a)
        found = requantize(
            factors,
            h,
            gram=gram,
            num_bits=config.num_bits,
            group_size=config.group_size,
            rounding=config.rounding,
            iterations=config.iterations if config.resolve else 0,
            on_progress=on_progress,
        )
        return FactorOutcome(found.factors, found.losses, len(found.losses) - 1, found.stop_reason, found.counts)

    def loss(self, target: Tensor, statistic: InputSecondMoment | InputGram, approximation: Tensor) -> float:
        """The objective on the weight as it is, relative to 0 in the product's place."""
        h, gram = self._moments(statistic, target)
        if gram is not None:
            return hessian_loss(target, gram, approximation, normalize=False)
        return relative_loss(target, h, approximation, normalize=False)

    def _moments(self, statistic: InputSecondMoment | InputGram, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mean squares h `(I,)`, and with `hessian` the regularised Gram matrix `(I, I)`, on the device of `like`."""
        if isinstance(statistic, InputSecondMoment):
            return statistic.value.to(like.device), None
        gram = statistic.value.to(like.device)
        return gram.diagonal().contiguous(), regularize(
            gram, shrinkage=self.config.shrinkage, damping=self.config.damping
        )[0]
