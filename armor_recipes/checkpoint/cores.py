"""2:4 weights that came without factors, as cores: dense ones, and quantised ones whose numbers a core can hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from armor_recipes.checkpoint.config import LayerSpec
from armor_recipes.checkpoint.packing import GROUP_STEP, PACKABLE_DTYPES, PackedLinear, pack_2of4, pack_int4
from armor_recipes.checkpoint.quantized import QuantizedLinear, Scheme
from armor_recipes.errors import UnfitError

_CORES = {("int", 8): "int8", ("int", 4): "int4", ("float", 8): "fp8"}
NOT_2OF4 = "not 2:4"
_ADVICE = "leave the layer as it is, or export to dense first"


def is_2of4(weight: Tensor) -> bool:
    """Whether each four consecutive entries of a row hold at most two that are not zero, in rows of a multiple of 8."""
    if weight.dim() != 2 or not weight.numel() or weight.shape[1] % 8 or weight.dtype not in PACKABLE_DTYPES:
        return False
    return bool(((weight != 0).view(weight.shape[0], -1, 4).sum(-1) <= 2).all())


def mask_2of4(weight: Tensor) -> Tensor:
    """What is not zero, and the first zeros of a group where that is less than 2; `(O, I)` bool."""
    zero = (weight == 0).view(-1, 4).to(torch.uint8)
    order = zero.argsort(dim=-1, stable=True)
    return torch.zeros_like(zero).scatter_(1, order[:, :2], 1).bool().view(weight.shape)


def dense_core(weight: Tensor) -> PackedLinear:
    """A dense 2:4 weight as a float core of block size 1 with identity factors: Ŵ is the weight, bit for bit."""
    return PackedLinear.plain(*pack_2of4(weight, mask_2of4(weight)))


def quantized_core(layer: QuantizedLinear, *, name: str = "this layer") -> PackedLinear:
    """A quantised 2:4 weight as a core of the same numbers and scales, of block size 1 with identity factors.

    Raises:
        UnfitError: where no core holds such numbers, or the weight is not 2:4.
        CheckpointError: where the numbers are damaged.
    """
    if not is_2of4(layer.dequantize(torch.float32)):
        raise UnfitError(NOT_2OF4, _ADVICE)
    steps = layer.steps()
    spec = core_spec(layer.scheme, steps.shape[1])
    kept, bitmask = pack_2of4(steps, mask_2of4(steps))
    scale = layer.tensors["weight_scale"].reshape(len(steps), -1).contiguous()
    if spec.core == "fp8":
        values = kept.to(torch.float8_e4m3fn)
    else:
        values = kept.to(torch.int8) if spec.core == "int8" else pack_int4(kept.to(torch.int8))
    a, b = (scale.new_ones(size, 1, 1) for size in steps.shape)
    packed = PackedLinear(values, bitmask, a, b, scale, spec.activations)
    packed.validate(name=name)
    return packed


def core_spec(scheme: Scheme, columns: int) -> LayerSpec:
    """What config.json says of a weight `(O, columns)` of that scheme as a core. Raises UnfitError where there is none."""
    args = scheme.args
    weights, kept = args.weights, columns // 2
    core = _CORES.get((str(weights.type), weights.num_bits))
    grouped = weights.strategy == "group" and core != "fp8"
    if core is None or not weights.symmetric or not (grouped or weights.strategy == "channel"):
        raise UnfitError(f"2:4, but no core holds {scheme.described.partition(';')[0]}", _ADVICE)
    if weights.actorder == "group":
        raise UnfitError("2:4, but groups in an order of their own (actorder: group) have no place in a core", _ADVICE)
    group = weights.group_size // 2 if grouped and weights.group_size != columns else None
    if (group or 0) % GROUP_STEP or (core == "int4" and kept % GROUP_STEP):
        raise UnfitError(
            f"2:4, but a core has groups and {core} rows of a multiple of {2 * GROUP_STEP} columns", _ADVICE
        )
    return LayerSpec((1, 1), core, None, group, None, _activations(scheme))


def _activations(scheme: Scheme) -> str | None:
    """What comes to the layer is rounded to, which with B the identity is Bx; raises UnfitError where a core has no such thing."""
    found: Any = scheme.args.input_activations
    if scheme.args.output_activations is not None:
        raise UnfitError("2:4, but outputs of a core are not quantised", _ADVICE)
    if found is None:
        return None
    if found.num_bits != 8 or not found.symmetric or found.dynamic is not True or found.strategy != "token":
        raise UnfitError(
            "2:4, but inputs of a core are rounded to symmetric 8 bits with a dynamic scale for each token, not to "
            f"{scheme.described.partition('inputs ')[2]}",
            _ADVICE,
        )
    return "int8" if found.type == "int" else "fp8"
