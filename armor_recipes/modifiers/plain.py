"""Plain weights quantised as a scheme says: what of it can be made here, how many bytes it takes, and the layer that is stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from armor_recipes.calibration.ranges import InputRange
from armor_recipes.checkpoint.quantized import QuantizedCache, QuantizedLinear, Scheme, cache_args, cache_tensors
from armor_recipes.errors import CheckpointError, UnfitError
from armor_recipes.modifiers.base import Estimate, ModuleShape, Tap
from armor_recipes.modifiers.observers import ActivationRange, rule_of
from armor_recipes.modifiers.scales import activation_scales, global_scale_of, weight_scales

#: Working copies of an (O, I) float32 matrix while it is rounded and packed.
_WORKING_COPIES = 4
_DTYPES = {2: torch.bfloat16, 4: torch.float32}


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
    if args.weights.dynamic:
        raise UnfitError(f"{name}: a weight has no dynamic scales", advice)
    for part in (args.weights, args.input_activations):
        size = None if part is None else part.group_size
        if size is not None and size > 0 and module.d_in % size:
            fits = [n for n in range(16, module.d_in + 1, 16) if module.d_in % n == 0]
            raise UnfitError(
                f"groups of {size} do not divide the {module.d_in} columns of {name}",
                f"sizes that fit: {fits}; {advice}",
            )
    block = args.weights.block_structure
    if block is not None and module.d_in % block[1]:
        raise UnfitError(f"blocks of {block[1]} columns do not divide the {module.d_in} of {name}", advice)
