"""`GPTQModifier`: quantise whole weights column by column, each error made up for in the columns that are still to come."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, Field
from torch import Tensor

from armor_recipes.calibration.moment_range import MomentAndRange
from armor_recipes.calibration.ranges import InputRange
from armor_recipes.calibration.statistics import InputGram
from armor_recipes.checkpoint.quantized import Scheme
from armor_recipes.errors import PlanError
from armor_recipes.modifiers.base import Estimate, ModuleShape
from armor_recipes.modifiers.kinds.factor import FactorModifier
from armor_recipes.modifiers.kinds.module import ModulePlan
from armor_recipes.modifiers.kinds.quantizer import QuantizedOutcome
from armor_recipes.modifiers.plain import (
    observed_inputs,
    plan_plain,
    shared_scale,
    stored,
    weighs_columns,
)
from armor_recipes.modifiers.registry import register
from armor_recipes.modifiers.scales import weight_scales
from armor_recipes.modifiers.scheme_quantizer import SchemeQuantizer
from armor_recipes.modifiers.schemes import SchemeConfig
from armor_recipes.solver.gptq import gptq_weight


def _order(value: str) -> str:
    """`static`, which llm-compressor calls `weight`, too. Raises ValueError for its other orders."""
    if value not in ("static", "weight"):
        raise ValueError(
            f"actorder: {value} is not here: `static` takes the columns by falling input, with scales of the groups as they stand; "
            "`group` would regroup them, which no server does fast; null takes them from left to right"
        )
    return "static"


class GPTQConfig(SchemeConfig):
    """Quantise linear weights by compressed-tensors' schemes with GPTQ (arXiv 2210.17323)."""

    needs_calibration: ClassVar[bool] = True

    block_size: Annotated[int, Field(strict=True, ge=1)] = Field(
        default=128,
        title="Block size",
        description="Columns between two updates of the rest; it changes rounding only.",
    )
    dampening_frac: Annotated[float, Field(ge=0, allow_inf_nan=False)] = Field(
        default=0.01,
        title="Damping",
        description="Share of the mean diagonal of H = XXᵀ/n that is added to its diagonal.",
    )
    actorder: Annotated[str, AfterValidator(_order)] | None = Field(
        default="static",
        title="Activation order",
        description="`static` (or `weight`), columns by falling mean square of their input, each with the scale of its own group; "
        "null, from left to right. A scheme that names an order of its own has it.",
    )


@register
class GPTQModifier(SchemeQuantizer[GPTQConfig]):
    """Quantises whole weights by GPTQ. Where pruning has left a mask of zeros these stay."""

    config_type = GPTQConfig
    category: ClassVar[str] = "quantize"

    def scheme_of(self, name: str, module: Any) -> Scheme | None:
        """The scheme of the group that takes a module, with the order of its columns; None where none does."""
        found = super().scheme_of(name, module)
        return None if found is None else _ordered(found, self.config)

    def core(self, scheme: Scheme) -> FactorModifier[Any]:  # noqa: ARG002 - whatever the scheme is
        """Nothing: cores are another modifier's."""
        raise PlanError(
            "modules with ARMOR factors are quantised by QuantizationModifier, which re-solves A and B (`rounding: gptq` with "
            "`objective: hessian` does so by GPTQ): take it for them, or add them to `ignore`"
        )

    def core_of_row(self, row: ModulePlan) -> FactorModifier[Any]:
        """Nothing: no core is planned."""
        raise PlanError(f"{row.name} has factors, which GPTQModifier does not quantise")

    def plan(self, module: ModuleShape, scheme: Scheme) -> Estimate:
        """As for rounding to nearest, with the factorisation of H and the update of the weight on top."""
        cost, (d_out, d_in) = plan_plain(module, scheme), (module.d_out, module.d_in)
        flops = cost.flops + 3.0 * d_in**3 + 2.0 * d_out * d_in**2
        return replace(cost, flops=flops, peak_bytes=cost.peak_bytes + 40 * d_in**2 + 16 * d_out * d_in)

    def observes(self, scheme: Scheme) -> bool:  # noqa: ARG002 - every weight is rounded by its inputs
        """Always."""
        return True

    def alike(self, module: ModuleShape) -> Hashable:
        """The observer of its inputs."""
        scheme = self.config.scheme_of(module.name)
        return None if scheme is None else observed_inputs(module, scheme).choose

    def statistic(self, module: ModuleShape) -> MomentAndRange[InputGram]:
        """H: the mean of x xᵀ over the calibration tokens, `(I, I)`, and the range of x."""
        scheme = self.config.scheme_of(module.name)
        assert scheme is not None
        return MomentAndRange(InputGram(module.name, module.d_in), observed_inputs(module, scheme))

    def quantize(
        self,
        module: ModuleShape,  # noqa: ARG002 - nothing depends on the name
        weight: Tensor,
        statistic: MomentAndRange[InputGram],
        scheme: Scheme,
        together: Sequence[Tensor],
        outputs: InputRange | None = None,
    ) -> QuantizedOutcome:
        """Round to the grid of the scales that rounding to nearest would have."""
        gram = statistic.moment.value.to(weight.device)
        importance = gram.diagonal() if weighs_columns(scheme) else None
        shared = shared_scale(together, scheme, importance)
        scales = weight_scales(weight, scheme.args.weights, shared, importance)
        found, counts = gptq_weight(
            weight,
            gram,
            _nearest(weight, scheme.args.weights, scales),
            damping=self.config.dampening_frac,
            block_columns=self.config.block_size,
            descending=scheme.args.weights.actorder is not None,
        )
        return QuantizedOutcome(stored(found.to(weight.dtype), scheme, scales, statistic.range, outputs), counts)


def _ordered(scheme: Scheme, config: GPTQConfig) -> Scheme:
    """The scheme with the modifier's order of columns where it has none itself. Raises PlanError where both have, and differ."""
    args = scheme.args
    own = getattr(args.weights.actorder, "value", args.weights.actorder)
    if own is None:
        chosen = config.actorder
    else:
        try:
            chosen = _order(own)
        except ValueError as error:
            raise PlanError(str(error)) from error
        if "actorder" in config.model_fields_set and config.actorder != chosen:
            raise PlanError(
                f"actorder is {config.actorder} on the modifier and {own} in its scheme: leave out one of them"
            )
    weights = args.weights.model_copy(update={"actorder": chosen})
    return Scheme.of(args.model_copy(update={"weights": type(weights)(**weights.model_dump())}))


def _nearest(weight: Tensor, args: Any, scales: dict[str, Tensor]) -> Callable[[Tensor, int], Tensor]:
    """What rounds one column of the weight `(O, I)` to the grid of its scales, by compressed-tensors' own arithmetic."""
    from compressed_tensors.quantization import QuantizationStrategy, fake_quantize

    by_row = args.model_copy(update={"strategy": QuantizationStrategy.CHANNEL, "group_size": None})
    scale, zero = (_by_group(weight, args, scales[f"weight_{part}"]) for part in ("scale", "zero_point"))
    if "weight_global_scale" in scales:
        scale = scale / scales["weight_global_scale"]
    sizes = {"group": args.group_size, "tensor_group": args.group_size, "block": (args.block_structure or (1, 1))[1]}
    size = sizes.get(args.strategy, weight.shape[1])

    def nearest(values: Tensor, column: int) -> Tensor:
        group = slice(column // size, column // size + 1)
        found: Tensor = fake_quantize(values[:, None], scale[:, group], zero[:, group], by_row)
        return found[:, 0]

    return nearest


def _by_group(weight: Tensor, args: Any, values: Tensor) -> Tensor:
    """Scales or zero points as `(O, groups of columns)`, scales in float32."""
    wide = values.float() if values.is_floating_point() else values
    if args.strategy == "block":
        return wide.repeat_interleave(args.block_structure[0], 0)[: len(weight)]
    return wide.reshape(-1, wide.shape[-1]).expand(len(weight), -1)
