"""`QuantizationModifier`: whole weights rounded to a scheme, or the kept values of S, with A and B re-solved around them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from armor_recipes.calibration.moment_range import MomentAndRange
from armor_recipes.calibration.ranges import InputRange
from armor_recipes.calibration.statistics import InputGram, InputSecondMoment
from armor_recipes.checkpoint.quantized import Scheme, word
from armor_recipes.errors import UnfitError
from armor_recipes.modifiers.base import AnyModifier, Estimate, ModuleShape, Propagate, SolveProgress
from armor_recipes.modifiers.kinds.factor import FactorModifier, FactorOutcome
from armor_recipes.modifiers.kinds.module import ModulePlan
from armor_recipes.modifiers.kinds.quantizer import QuantizedOutcome
from armor_recipes.modifiers.plain import (
    observed_inputs,
    plan_plain,
    quantized,
    shared_scale,
    weighs_columns,
)
from armor_recipes.modifiers.registry import register
from armor_recipes.modifiers.scheme_quantizer import SchemeQuantizer
from armor_recipes.modifiers.schemes import SchemeConfig
from armor_recipes.solver.hessian import hessian_loss, regularize
from armor_recipes.solver.normalize import relative_loss
from armor_recipes.solver.quantize import Rounding, requantize
from armor_recipes.solver.result import SparseFactors

#: Products of (O, I) with a block-diagonal factor in one cycle of A and B.
_PRODUCTS = 8
#: Working copies of an (O, I) float32 matrix that a change holds at its peak.
_WORKING_COPIES = 12


class QuantizationConfig(SchemeConfig):
    """Quantise linear weights by compressed-tensors' schemes; of 2:4 factors the core, and A and B are re-solved around it."""

    propagate: Propagate = Field(
        default="compressed",
        title="Error propagation",
        description="Where calibration inputs come from: `compressed`, the model as compressed so far, quantised layers with "
        "it; `dense`, the original model, on which llm-compressor calibrates static scales.",
    )
    resolve: Annotated[bool, Field(strict=True)] = Field(
        default=True,
        title="Re-solve A and B",
        description="Solve A and B again around the rounded values, so that the product comes closer to what it was; false leaves "
        "them, but for the scale of `gauge` in B.",
    )
    iterations: Annotated[int, Field(strict=True, ge=1)] = Field(
        default=10,
        title="Iterations",
        description="Cycles of `rounding: descent`, A and B at most; fewer where the last gained less than 0.1 %.",
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
    gauge: Annotated[bool, Field(strict=True)] = Field(
        default=True,
        title="Gauge",
        description="Choose a scale between B and S for each column before S is rounded, by the error that rounding leaves; false "
        "leaves it. The product is the same either way.",
    )
    rounding: Rounding = Field(
        default="descent",
        title="Rounding",
        description="`descent`: to nearest first, then in each cycle every kept value again, as good as its grid allows given all "
        "others, A and B; `nearest`, once; or `gptq`, once, which moves the error of each kept value to the later ones of its row. "
        "It goes with `objective: hessian`, and costs (I/2)^3 operations for each row of the weight.",
    )

    @model_validator(mode="after")
    def _check_fields(self) -> QuantizationConfig:
        if self.rounding == "gptq" and self.objective != "hessian":
            raise ValueError("rounding: gptq goes with objective: hessian, whose correlations it needs")
        return self


@dataclass(frozen=True, slots=True)
class CoreScheme:
    """What a core is quantised to.

    Attributes:
        core: `int8`, `int4` or `fp8`.
        group_size: kept values of a row that have one scale; None for a whole row.
        activations: what Bx is rounded to as the layer runs: `int8`, `fp8`, or None for nothing.
    """

    core: Literal["int8", "int4", "fp8"]
    group_size: int | None = None
    activations: str | None = None

    @property
    def num_bits(self) -> int:
        """Of a kept value."""
        return 4 if self.core == "int4" else 8


def core_of(module: ModuleShape, scheme: Any) -> CoreScheme:
    """What the core of a module is quantised to by compressed-tensors' scheme; raises UnfitError where there is no such core."""
    weights, kept = scheme.weights, module.d_in // 2
    advice = f"quantise it otherwise in a group of its own, or add {module.name!r} to `ignore`"
    core = {("int", 8): "int8", ("int", 4): "int4", ("float", 8): "fp8"}.get((weights.type, weights.num_bits))
    grouped = weights.strategy == "group" and core != "fp8"
    if core is None or not weights.symmetric or not (grouped or weights.strategy == "channel"):
        raise UnfitError(
            f"the core of {module.name} is stored as symmetric integers of 8 or 4 bits with a scale for a row or for groups of it, "
            "or as 8-bit floats with a scale for a row, not as "
            f"{'' if weights.symmetric else 'asymmetric '}{word(weights.type)}{weights.num_bits} by {word(weights.strategy)}",
            advice,
        )
    if core == "int4" and kept % 8:
        raise UnfitError(f"int4 needs rows of a multiple of 16 entries, {module.name} has {module.d_in}", advice)
    size = weights.group_size if grouped else None
    if size is not None and (size % 16 or module.d_in % size):
        sizes = [size for size in range(16, module.d_in + 1, 16) if module.d_in % size == 0]
        raise UnfitError(
            f"group_size {size} is no multiple of 16 that divides the {module.d_in} columns of {module.name}",
            f"sizes that fit: {sizes}, or strategy: channel",
        )
    group = None if size is None or size == module.d_in else size // 2
    return CoreScheme(core, group, _activations_of(module, scheme, advice))  # type: ignore[arg-type]


def _activations_of(module: ModuleShape, scheme: Any, advice: str) -> str | None:
    """What Bx is rounded to; raises UnfitError for anything but 8 bits with a dynamic scale for each token."""
    args = scheme.input_activations
    if scheme.output_activations is not None:
        raise UnfitError(
            f"outputs of a layer with a 2:4 core are not quantised, and those of {module.name} are to be", advice
        )
    if args is None:
        return None
    if args.num_bits != 8 or not args.symmetric or args.dynamic is not True or args.strategy != "token":
        raise UnfitError(
            f"activations of the core of {module.name} are symmetric numbers of 8 bits with a dynamic scale for each token, as in "
            f"W8A8 and FP8_DYNAMIC, not {'dynamic' if args.dynamic else 'static'} {'' if args.symmetric else 'asymmetric '}"
            f"{word(args.type)}{args.num_bits} by {word(args.strategy)}",
            advice,
        )
    return "int8" if args.type == "int" else "fp8"


class CoreQuantizer(FactorModifier[QuantizationConfig]):
    """Quantises the core of factors that were made before, around the product that they give.

    `core` is what it is quantised to, where that is planned; else the scheme says it.
    """

    config_type = QuantizationConfig
    category: ClassVar[str] = "quantize"

    def __init__(
        self,
        config: QuantizationConfig,
        *,
        scheme: Scheme | None = None,
        core: CoreScheme | None = None,
    ) -> None:
        super().__init__(config)
        self.scheme = scheme
        self.core = core

    def plan(self, module: ModuleShape, block_size: tuple[int, int]) -> Estimate:
        """Check that groups are whole; PlanError names what to do."""
        config, (b_o, b_i) = self.config, block_size
        kept = module.d_in // 2
        core = self._core_of(module)
        group = core.group_size or kept
        entries = module.d_out * module.d_in
        factor_bytes = (module.d_out * b_o + module.d_in * b_i) * module.itemsize
        scale_bytes = module.d_out * (kept // group) * module.itemsize
        core_bytes = entries // 2 * core.num_bits // 8 + entries // 8 + scale_bytes
        cycles = config.iterations if config.resolve or config.rounding == "descent" else 0
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
            core=core.core,
            group_size=core.group_size,
            activations=core.activations,
        )

    def statistic(self, module: ModuleShape) -> InputSecondMoment | InputGram:
        """h: the mean of x² over the calibration tokens, `(I,)`; or the means of all products of two channels."""
        kind = InputGram if self.config.objective == "hessian" else InputSecondMoment
        return kind(module.name, module.d_in)

    def change(
        self,
        module: ModuleShape,
        factors: SparseFactors,
        statistic: InputSecondMoment | InputGram,
        on_progress: SolveProgress | None,
    ) -> FactorOutcome:
        """Quantise the core, and solve its values, A and B again."""
        config, (h, gram) = self.config, self._moments(statistic, factors.a)
        core = self._core_of(module)
        found = requantize(
            factors,
            h,
            gram=gram,
            num_bits=core.num_bits,
            group_size=core.group_size,
            rounding=config.rounding,
            gauge=config.gauge,
            numbers="fp8" if core.core == "fp8" else "int",
            activations=core.activations,
            iterations=config.iterations,
            resolve=config.resolve,
            on_progress=on_progress,
        )
        return FactorOutcome(found.factors, found.losses, len(found.losses) - 1, found.stop_reason, found.counts)

    def loss(self, target: Tensor, statistic: InputSecondMoment | InputGram, approximation: Tensor) -> float:
        """The objective on the weight as it is, relative to 0 in the product's place."""
        h, gram = self._moments(statistic, target)
        if gram is not None:
            return hessian_loss(target, gram, approximation, normalize=False)
        return relative_loss(target, h, approximation, normalize=False)

    def _core_of(self, module: ModuleShape) -> CoreScheme:
        """What the core is quantised to. Raises UnfitError."""
        if self.core is not None:
            return self.core
        assert self.scheme is not None
        core = core_of(module, self.scheme.args)
        if core.core == "fp8" and self.config.rounding == "gptq":
            raise UnfitError(
                f"rounding: gptq is for integers, and the core of {module.name} is to be 8-bit floats",
                "set rounding: descent",
            )
        return core

    def _moments(self, statistic: InputSecondMoment | InputGram, like: Tensor) -> tuple[Tensor, Tensor | None]:
        """The mean squares h `(I,)`, and with `hessian` the regularised Gram matrix `(I, I)`, on the device of `like`."""
        if isinstance(statistic, InputSecondMoment):
            return statistic.value.to(like.device), None
        gram = statistic.value.to(like.device)
        return gram.diagonal().contiguous(), regularize(
            gram, shrinkage=self.config.shrinkage, damping=self.config.damping
        )[0]


@register
class QuantizationModifier(SchemeQuantizer[QuantizationConfig]):
    """Quantises linear modules by rounding to nearest: the core of those with factors, the whole weight of others."""

    config_type = QuantizationConfig
    category: ClassVar[str] = "quantize"

    def poor_after(self, earlier: AnyModifier[Any], rows: Sequence[Any]) -> str:
        """What int4 cores, and 8-bit activations without a gauge, were measured to cost (docs/solver.md)."""
        if "factors" not in earlier.words:
            return ""
        if any(row.core == "int4" for row in rows):
            return self._int4_figure()
        if not self.config.gauge and any(row.activations == "int8" for row in rows):
            return "W8A8 cores without `gauge` raised perplexity by 4.1 % on the embedded model, by 0.04 % with it"
        return ""

    def _int4_figure(self) -> str:
        if not self.config.resolve:
            return "int4 cores with A and B left raised perplexity by 38 % on SmolLM2-135M, by 12 to 18 % with `resolve: true`"
        if not self.config.gauge:
            return "int4 cores without `gauge` raised perplexity by 12 to 18 % on SmolLM2-135M, int8 by 0.3 % at most"
        if self.config.rounding == "nearest":
            return "int4 cores rounded once raised perplexity by 1.5 % on the embedded model, by 0.6 % with `rounding: descent`"
        return (
            "int4 cores raised perplexity by 0.6 % on the embedded model and by 10 to 12 % on SmolLM2-135M, by 7 to 9 % there with "
            "`objective: hessian`, and by 3 to 6 % where a DistillationModifier followed"
        )

    def core(self, scheme: Scheme) -> CoreQuantizer:
        """What quantises a core to a scheme."""
        return CoreQuantizer(self.config, scheme=scheme)

    def core_of_row(self, row: ModulePlan) -> CoreQuantizer:
        """What quantises a core as it was planned."""
        return CoreQuantizer(self.config, core=CoreScheme(row.core, row.group_size, row.activations))  # type: ignore[arg-type]

    def plan(self, module: ModuleShape, scheme: Scheme) -> Estimate:
        """Check that groups are whole and the scheme is one that can be made here; bytes are those of the tensors themselves."""
        return plan_plain(module, scheme)

    def observes(self, scheme: Scheme) -> bool:
        """Whether inputs have scales of their own, or columns are weighed by them."""
        inputs = scheme.args.input_activations
        return weighs_columns(scheme) or (inputs is not None and inputs.dynamic is not True)

    def alike(self, module: ModuleShape) -> Hashable:
        """The observers of plain weights."""
        scheme = None if module.block_size is not None else self.config.scheme_of(module.name)
        return None if scheme is None else (weighs_columns(scheme), observed_inputs(module, scheme).choose)

    def statistic(self, module: ModuleShape) -> Any:
        """Of factors what their core is quantised on, of other modules the range of inputs and what else observers ask for."""
        if module.block_size is not None:
            return CoreQuantizer(self.config).statistic(module)
        scheme = self.config.scheme_of(module.name)
        assert scheme is not None
        range_ = observed_inputs(module, scheme)
        return MomentAndRange(InputSecondMoment(module.name, module.d_in), range_) if weighs_columns(scheme) else range_

    def quantize(
        self,
        module: ModuleShape,  # noqa: ARG002 - nothing depends on the name
        weight: Tensor,
        statistic: InputRange | MomentAndRange[InputSecondMoment] | None,
        scheme: Scheme,
        together: Sequence[Tensor],
        outputs: InputRange | None = None,
    ) -> QuantizedOutcome:
        """Round to nearest. Modules that read the same tensor have one global scale, where the scheme has any."""
        importance, observed = None, statistic
        if isinstance(statistic, MomentAndRange):
            importance, observed = statistic.moment.value, statistic.range
        assert not isinstance(observed, MomentAndRange)
        shared = shared_scale(together, scheme, importance)
        return QuantizedOutcome(quantized(weight, scheme, observed, shared, importance, outputs))
