"""Scales and zero points of weights and activations, by compressed-tensors' own arithmetic on ranges that are observed here."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from armor_recipes.calibration.ranges import InputRange
from armor_recipes.errors import PlanError

WHOLE = ("memoryless_minmax", "static_minmax", "minmax")
"""Observers that take the range of all that they see. Of a weight, which is seen once, they are the same."""
_MOVING = 0.01


def check_observer(args: Any, what: str) -> None:
    """Raise PlanError for an observer that is not here."""
    if args is not None and args.dynamic is not True and args.observer not in (None, *WHOLE):
        raise PlanError(
            f"observer {args.observer} of {what} is not here: take one of {', '.join(WHOLE)}, or leave it out"
        )


def weight_scales(weight: Tensor, args: Any, global_scale: Tensor | None = None) -> dict[str, Tensor]:
    """Scale, zero point and, with `tensor_group`, global scale of a weight `(O, I)`, by the names that they are stored by.

    `args` are compressed-tensors'. Scales are in the weight's dtype. On the meta device only shapes and dtypes are worked out.
    """
    from compressed_tensors.quantization.utils import calculate_qparams

    if args.strategy == "tensor_group" and global_scale is None:
        global_scale = global_scale_of(weight)
    low, high = _ranges(weight, args)
    scale, zero = calculate_qparams(low, high, args, global_scale=global_scale)
    found = {"weight_scale": scale.to(weight.dtype), "weight_zero_point": zero}
    return found if global_scale is None else {**found, "weight_global_scale": global_scale}


def global_scale_of(weight: Tensor) -> Tensor:
    """The scale of a whole weight by which those of its groups fit their own dtype, `(1,)` float32."""
    from compressed_tensors.quantization.utils import generate_gparam

    found: Tensor = generate_gparam(weight.amin(), weight.amax())
    return found


def activation_scales(part: str, args: Any, observed: InputRange | None, like: Tensor) -> dict[str, Tensor]:
    """What is stored of activations (`part`: `input` or `output`) that are not wholly dynamic, in the dtype of `like`."""
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    if args is None or args.dynamic is True:
        return {}
    if like.is_meta:
        low = high = torch.zeros((), dtype=like.dtype, device="meta")
    else:
        assert observed is not None
        low, high = observed.extremes(moving=_MOVING if args.observer == "minmax" else None)
    if args.strategy == "tensor_group":
        return {f"{part}_global_scale": generate_gparam(low.float(), high.float())}
    scale, zero = calculate_qparams(low.to(like.dtype), high.to(like.dtype), args)
    return {f"{part}_scale": scale, f"{part}_zero_point": zero}


def _ranges(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of what has one scale, in the scale's shape."""
    match args.strategy:
        case "tensor":
            return weight.amin().reshape(1), weight.amax().reshape(1)
        case "channel":
            return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case "group" | "tensor_group":
            groups = weight.unflatten(1, (-1, args.group_size))
            return groups.amin(-1), groups.amax(-1)
        case _:
            rows, columns = args.block_structure
            o, i = weight.shape
            whole = pad(weight, (0, -i % columns, 0, -o % rows))  # 0 is in every range anyway
            blocks = whole.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
            return blocks.amin((1, 3)), blocks.amax((1, 3))
