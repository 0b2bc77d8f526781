"""Many tokens on a CPU: unpack the core into one buffer that all layers share, and multiply densely."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.runtime.kernel import unpack_into
from armor_recipes.solver.blockdiag import apply_input_factor, apply_output_factor

_buffers = threading.local()


def run_dense(
    x: Tensor, packed: PackedLinear, bias: Tensor | None, dtype: torch.dtype, core: Tensor | None = None
) -> Tensor:
    """Compute `A (S (B x)) + bias` `(..., O)` in `dtype` by dense products, without gradients; returned in x's dtype.

    Args:
        x: `(..., I)`, on the CPU.
        packed: the layer.
        bias: `(O,)` or None.
        dtype: the packed floats' or float32.
        core: S `(O, I)` in `dtype`, if it was kept; None unpacks it into this thread's buffer.
    """
    if core is None:
        core = _buffer(packed.shape, dtype)
        unpack_into(packed, core)
    inner = nn.functional.linear(apply_input_factor(x.to(dtype), packed.b.to(dtype)), core)
    y = apply_output_factor(inner, packed.a.to(dtype))
    return (y if bias is None else y + bias.to(dtype)).to(x.dtype)


def unpacked(packed: PackedLinear, dtype: torch.dtype) -> Tensor:
    """Return S `(O, I)` in a tensor of its own, for layers that keep it."""
    core = torch.empty(packed.shape, dtype=dtype, device="cpu")
    unpack_into(packed, core)
    return core


def _buffer(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A part of this thread's buffer, which is as large as the largest layer so far."""
    size = shape[0] * shape[1] * dtype.itemsize
    held: Tensor | None = getattr(_buffers, "bytes", None)
    if held is None or held.numel() < size:
        _buffers.bytes = None  # freed before the larger one is made
        # Made under inference mode it could not be written to outside.
        with torch.inference_mode(False):
            _buffers.bytes = held = torch.empty(size, dtype=torch.uint8, device="cpu")
    return held[:size].view(dtype).view(shape)
