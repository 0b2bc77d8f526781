"""8-bit activations of a core: the entries of Bx rounded, with a scale for each token that is made of it as it comes."""

from __future__ import annotations

import torch
from torch import Tensor

_STEPS = {"int8": 127.5, "fp8": float(torch.finfo(torch.float8_e4m3fn).max)}
"""What the largest entry of a token becomes: compressed-tensors' scales of symmetric numbers, of which 127.5 is half the range."""


def round_activations(x: Tensor, numbers: str) -> Tensor:
    """What 8-bit numbers with one scale a token stand for, in the dtype of x `(..., I)`.

    As compressed-tensors' dynamic scheme of strategy `token`: scale = max|x| / 127.5 (`int8`, clamped to -128 … 127) or / 448
    (`fp8`, float8_e4m3fn); computed in float32. Gradients pass as if nothing had been rounded.

    Args:
        x: activations, the entries of Bx.
        numbers: `int8` or `fp8`.
    """
    wide = x.detach().float()
    scale = wide.abs().amax(-1, keepdim=True) / _STEPS[numbers]
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    if numbers == "int8":
        rounded = (wide / scale).round().clamp(-128, 127)
    else:
        limit = _STEPS["fp8"]
        rounded = (wide / scale).clamp(-limit, limit).to(torch.float8_e4m3fn).float()
    found = (rounded * scale).to(x.dtype)
    return x + (found - x).detach() if x.requires_grad else found
