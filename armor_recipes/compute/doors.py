"""Checks at the doors of compiled code, which takes pointers at their word."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor


def check_tensors(
    what: str,
    tensors: Mapping[str, tuple[Tensor, torch.dtype, tuple[int, ...]]],
    *,
    device: Literal["cpu"] | torch.device = "cpu",
) -> None:
    """Raise TypeError unless each tensor is contiguous, on the device, in its dtype and of its shape.

    Args:
        what: the compiled code, for the message.
        tensors: name → tensor, and the dtype and shape that it must have.
        device: where all must be.
    """
    wanted_device = torch.device(device)
    for name, (tensor, dtype, shape) in tensors.items():
        found = tensor.dtype, tuple(tensor.shape), tensor.device
        if found != (dtype, shape, wanted_device) or not tensor.is_contiguous():
            contiguous = "" if tensor.is_contiguous() else ", not contiguous"
            raise TypeError(
                f"{what} takes {name} {shape} {dtype} on {wanted_device}, contiguous; got {found[1]} {found[0]} on "
                f"{found[2]}{contiguous}"
            )
