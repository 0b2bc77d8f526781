"""Products with block-diagonal factors, as batched matrix products. Shapes: A `(J, b_o, b_o)`, B `(K, b_i, b_i)`, S `(O, I)`."""

from __future__ import annotations

import torch
from torch import Tensor


def left_multiply(a: Tensor, s: Tensor) -> Tensor:
    """`A · S` for A `(J, b_o, b_o)` and S `(J·b_o, I)`; returns `(O, I)`."""
    blocks, size, _ = a.shape
    return torch.bmm(a, s.reshape(blocks, size, -1)).reshape(s.shape)


def right_multiply(s: Tensor, b: Tensor) -> Tensor:
    """`S · B` for S `(O, K·b_i)` and B `(K, b_i, b_i)`; returns `(O, I)`."""
    blocks, size, _ = b.shape
    columns = s.reshape(-1, blocks, size).transpose(0, 1)
    return torch.bmm(columns, b).transpose(0, 1).reshape(s.shape)


def fold(a: Tensor, core: Tensor, b: Tensor) -> Tensor:
    """`Ŵ = A · S · B`, accumulated in float32 whatever the inputs' dtype; returns `(O, I)` float32.

    The session and every loader fold through this one function, so equal factors give equal bits.
    """
    return left_multiply(a.float(), right_multiply(core.float(), b.float()))


def apply_input_factor(x: Tensor, b: Tensor) -> Tensor:
    """`B x` for activations x `(..., I)`: block k multiplies `x[..., k·b_i:(k+1)·b_i]`; returns `(..., I)`."""
    blocks, size, _ = b.shape
    return torch.einsum("...ki,kji->...kj", x.unflatten(-1, (blocks, size)), b).flatten(-2)


def apply_output_factor(y: Tensor, a: Tensor) -> Tensor:
    """`A y` for activations y `(..., O)`; returns `(..., O)`."""
    return apply_input_factor(y, a)
