"""Scales and zero points of weights and activations, by compressed-tensors' own arithmetic on ranges that are observed here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from armor_recipes.calibration.ranges import InputRange
from armor_recipes.modifiers.observers import rule_of, weight_range


def weight_scales(
    weight: Tensor, args: Any, global_scale: Tensor | None = None, importance: Tensor | None = None
) -> dict[str, Tensor]:
    """Scale, zero point and, with `tensor_group`, global scale of a weight `(O, I)`, by the names that they are stored by.

    `args` are compressed-tensors'; `importance` is what some observers weigh columns by. Scales are in the weight's dtype. On the
    meta device only shapes and dtypes are worked out.
    """
    if args.strategy == "tensor_group" and global_scale is None:
        global_scale = global_scale_of(weight, args, importance)
    low, high = weight_range(weight, args, importance)
    scale, zero = _scale_and_zero(low, high, args, global_scale)
    found = {"weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
    return found if global_scale is None else {**found, "weight_global_scale": global_scale}


def rounded(weight: Tensor, args: Any, global_scale: Tensor | None = None) -> Tensor:
    """A weight `(O, I)` on the grid of the scales that `weight_scales` gives it, in its own dtype."""
    from compressed_tensors.quantization import fake_quantize

    scales = weight_scales(weight, args, global_scale)
    found: Tensor = fake_quantize(
        weight, scales["weight_scale"], scales["weight_zero_point"], args, scales.get("weight_global_scale")
    )
    return found


def global_scale_of(weight: Tensor, args: Any, importance: Tensor | None = None) -> Tensor:
    """The scale of a whole weight by which those of its groups fit their own dtype, `(1,)` float32."""
    from compressed_tensors.quantization.utils import generate_gparam

    low, high = weight_range(weight, args, importance)
    found: Tensor = generate_gparam(low.amin(), high.amax())
    return found


def activation_scales(part: str, args: Any, observed: InputRange | None, like: Tensor) -> dict[str, Tensor]:
    """What is stored of activations (`part`: `input` or `output`) that are not wholly dynamic, in the dtype of `like`."""
    from compressed_tensors.quantization.utils import generate_gparam

    if args is None or args.dynamic is True:
        return {}
    if like.is_meta:
        low = high = torch.zeros((), dtype=like.dtype, device="meta")
    else:
        assert observed is not None
        rule = rule_of(args, weight=False)
        low, high = observed.extremes(moving=rule.moving, last=rule.over == "last")
    if args.strategy == "tensor_group":
        return {f"{part}_global_scale": generate_gparam(low.amin().float(), high.amax().float())}
    scale, zero = _scale_and_zero(low.to(like.dtype), high.to(like.dtype), args)
    return {f"{part}_scale": scale, f"{part}_zero_point": zero}


def _scale_and_zero(low: Tensor, high: Tensor, args: Any, global_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """compressed-tensors' scales and zero points of ranges, each value by itself.

    On the meta device they are those of one value in that shape: compressed-tensors 0.17 looks at values, which are not there.
    """
    from compressed_tensors.quantization.utils import calculate_qparams

    if not low.is_meta:
        scale, zero = calculate_qparams(low, high, args, global_scale=global_scale)
        return scale, zero
    one = torch.ones((), dtype=low.dtype)
    scale, zero = calculate_qparams(-one, one, args, global_scale=None if global_scale is None else torch.ones(1))
    like = low if global_scale is None else torch.broadcast_tensors(low, global_scale)[0]
    return like.new_empty(like.shape, dtype=scale.dtype), like.new_empty(like.shape, dtype=zero.dtype)
