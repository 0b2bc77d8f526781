"""Plain weights quantised as a scheme says: what of it can be made here, how many bytes it takes, and the layer that is stored."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from armor_recipes.calibration.ranges import InputRange
from armor_recipes.checkpoint.quantized import (
    QuantizedCache,
    QuantizedLinear,
    Scheme,
    cache_args,
    cache_tensors,
    described,
)
from armor_recipes.errors import ArmorError, CheckpointError, UnfitError
from armor_recipes.modifiers.base import Estimate, ModuleShape, Tap
from armor_recipes.modifiers.observers import ActivationRange, rule_of
from armor_recipes.modifiers.scales import activation_scales, global_scale_of, weight_scales
from armor_recipes.solver import relative_error

#: Working copies of an (O, I) float32 matrix while it is rounded and packed.
_WORKING_COPIES = 4
_DTYPES = {2: torch.bfloat16, 4: torch.float32}
#: Relative error of numbers that are as good as lost: that of zeros in their place is 1.
_LOST = 0.99
#: Standard deviation of the random numbers that a scheme is tried on.
_SMALL = 2**-5
#: How far the error of what is stored may be above that of rounding: scales are rounded, too, as they are stored.
_STORING, _ROUNDING = 1.25, 0.01


def plan_plain(module: ModuleShape, scheme: Scheme) -> Estimate:
    """The cost of one weight, its bytes exact. Raises UnfitError where the scheme cannot be made of it, with the reason."""
    _check(module, scheme)
    weight = torch.empty(module.d_out, module.d_in, dtype=_DTYPES[module.itemsize], device="meta")
    try:
        stored = quantized(weight, scheme, None)
    except CheckpointError as error:
        raise UnfitError(
            f"{module.name}: {error}", f"take another scheme, or add {module.name!r} to `ignore`"
        ) from error
    reason = _tried(scheme, weight.dtype)
    if reason:
        raise UnfitError(f"{module.name}: {reason}", f"take another scheme, or add {module.name!r} to `ignore`")
    entries = module.d_out * module.d_in
    return Estimate(
        stored_bytes=stored.nbytes,
        flops=20.0 * entries,
        peak_bytes=_WORKING_COPIES * 4 * entries,
        stored_as="quantized",
    )


def weighs_columns(scheme: Scheme) -> bool:
    """Whether the range of a weight is chosen by the mean squares of its input channels."""
    search = rule_of(scheme.args.weights, weight=True).search
    return search is not None and search.weighted


def observed_inputs(module: ModuleShape, scheme: Scheme) -> InputRange:
    """What observes a module's inputs for the scales of a scheme."""
    return InputRange(module.name, module.d_in, ActivationRange.of(scheme.args.input_activations))


def observed_tap(tap: Tap, args: Any) -> InputRange:
    """What observes what comes by a tap, for scales of compressed-tensors' args."""
    return InputRange(tap.name, tap.width, ActivationRange.of(args))


def cached(scheme: str, keys: InputRange | None, values: InputRange | None, dtype: torch.dtype) -> QuantizedCache:
    """What an attention module's cache needs, from what was observed of keys and values where their scales are static."""
    args, like = cache_args(scheme), torch.empty(0, dtype=dtype)
    found = {**activation_scales("k", args, keys, like), **activation_scales("v", args, values, like)}
    return QuantizedCache(scheme, {name: found[name] for name in cache_tensors(scheme)})


def shared_scale(together: Sequence[Tensor], scheme: Scheme, importance: Tensor | None = None) -> Tensor | None:
    """The global scale of weights that are run as one, where the scheme has any."""
    args = scheme.args.weights
    if args.strategy != "tensor_group":
        return None
    return torch.stack([global_scale_of(one, args, importance) for one in together]).amin(0)


def quantized(
    weight: Tensor,
    scheme: Scheme,
    observed: InputRange | None,
    global_scale: Tensor | None = None,
    importance: Tensor | None = None,
    outputs: InputRange | None = None,
) -> QuantizedLinear:
    """A weight `(O, I)` rounded to nearest, as it is stored. Raises CheckpointError where compressed-tensors cannot store it."""
    scales = weight_scales(weight, scheme.args.weights, global_scale, importance)
    return stored(weight, scheme, scales, observed, outputs)


def stored(
    weight: Tensor,
    scheme: Scheme,
    scales: dict[str, Tensor],
    observed: InputRange | None,
    outputs: InputRange | None = None,
) -> QuantizedLinear:
    """A weight `(O, I)` with scales that were chosen, as it is stored: what is on the grid of the scales stays as it is.

    `observed` and `outputs` are the ranges of inputs and outputs, for scales that are not dynamic.
    """
    args = scheme.args
    state = {"weight": weight, **scales}
    state |= activation_scales("input", args.input_activations, observed, weight)
    state |= activation_scales("output", args.output_activations, outputs, weight)
    return QuantizedLinear.compress(scheme, state)


def _check(module: ModuleShape, scheme: Scheme) -> None:
    """Raise UnfitError for what is not here, and for groups that are not whole."""
    args, name = scheme.args, module.name
    advice = f"take another scheme, or add {name!r} to `ignore`"
    rule_of(args.weights, weight=True)
    ActivationRange.of(args.input_activations)
    ActivationRange.of(args.output_activations)
    _check_dtypes(module, args.weights)
    if args.weights.dynamic:
        raise UnfitError(f"{name}: a weight has no dynamic scales", advice)
    for part in (args.weights, args.input_activations):
        size = None if part is None else part.group_size
        if size is not None and size > 0 and module.d_in % size:
            fits = [n for n in range(2, module.d_in + 1) if module.d_in % n == 0]
            fits = [n for n in fits if n % 16 == 0] or fits
            raise UnfitError(
                f"groups of {size} do not divide the {module.d_in} columns of {name}",
                f"sizes that fit: {fits}; {advice}",
            )
    block = args.weights.block_structure
    if block is not None and module.d_in % block[1]:
        raise UnfitError(f"blocks of {block[1]} columns do not divide the {module.d_in} of {name}", advice)


def _check_dtypes(module: ModuleShape, args: Any) -> None:
    """Raise UnfitError for dtypes of scales and zero points that are not those that would be stored."""
    scale, zero, own = args.scale_dtype, args.zp_dtype, _DTYPES[module.itemsize]
    if scale is not None and scale.is_floating_point and scale.itemsize > 1 and scale != own:
        raise UnfitError(
            f"{module.name}: scale_dtype is {scale}, and scales of 16 bits and more are stored in the weight's dtype",
            "leave scale_dtype out",
        )
    if zero is not None and zero.is_floating_point and args.type == "int":
        raise UnfitError(
            f"{module.name}: zp_dtype is {zero}, and zero points of integers are integers", "leave zp_dtype out"
        )


@lru_cache(maxsize=256)
def _tried(scheme: Scheme, dtype: torch.dtype) -> str:
    """Why numbers do not come back from what is stored of them, "" where they do. It is tried on random ones: compressed-tensors
    takes bits, dtypes and strategies together that overflow, or make zeros of everything.
    """
    args = scheme.args
    parts = {"weights": args.weights, "inputs": args.input_activations, "outputs": args.output_activations}
    try:
        numbers, found = _through(scheme, dtype)
    except (ArmorError, ArithmeticError, LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        return f"compressed-tensors cannot run {scheme.described} in {dtype}: {error}"
    for part, (value, rounded) in found.items():
        lost, least = relative_error(numbers, value), relative_error(numbers, rounded)
        if not lost <= min(_LOST, _STORING * least + _ROUNDING):
            return (
                f"{described(parts[part])} as {scheme.format} does not hold {part} of {dtype}: random numbers come back with an "
                f"error of {lost:.0%}, where rounding alone makes one of {least:.0%}"
            )
    return ""


def _through(scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Random numbers, as small as weights are, and what becomes of them as weights, inputs and outputs, float32: in a layer that
    is loaded, and rounded to the same scales.
    """
    from compressed_tensors.quantization import fake_quantize

    args = scheme.args
    activations = args.input_activations, args.output_activations
    rows, columns = args.weights.block_structure or (16, 64)
    sizes = [part.group_size for part in (args.weights, *activations) if part is not None and part.group_size]
    shape = 2 * rows, math.lcm(2 * columns, *(size for size in sizes if size > 0))
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    numbers = (noise * _SMALL).to(dtype)
    scales = weight_scales(numbers, args.weights, None, numbers.float().square().mean(0))
    whole = scales.get("weight_global_scale")
    rounded = fake_quantize(
        numbers, scales["weight_scale"], scales["weight_zero_point"], args.weights, global_scale=whole
    )
    layer = stored(numbers, scheme, scales, *(_range_of(numbers, part) for part in activations))
    found = {"weights": (layer.dequantize(torch.float32), rounded.float())}
    running = layer.activations(dtype)
    before, after = (None, None) if running is None else running.hooks
    if before is not None:
        found["inputs"] = (before(None, (numbers,))[0].float(),) * 2
    if after is not None:
        found["outputs"] = (after(None, (), numbers).float(),) * 2
    return numbers.float(), found


def _range_of(values: Tensor, args: Any) -> InputRange:
    """What an observer of activations would have seen of these."""
    found = InputRange("random numbers", values.shape[1], ActivationRange.of(args))
    found.update(values)
    return found
