"""Scales between a layer's activations and the weights that read them: what SmoothQuant divides by, and multiplies with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: The least scale, as in llm-compressor.
_LEAST = 1e-5


def smoothing_scales(spread: Tensor, weights: Sequence[Tensor], *, strength: float) -> Tensor:
    """`s_j = r_j^α / (2 max_i |W_ij|)^(1−α)`, at least 1e-5, float32 `(I,)` (SmoothQuant, arXiv 2211.10438, Eq. 4).

    As in llm-compressor the activations' size is their range r, not their largest size, and the weights' twice the largest.
    A channel whose weights are all zero takes r_j alone.

    Args:
        spread: r `(I,)`, the largest less the smallest activation of each channel.
        weights: those `(O, I)` that read the channels, any float dtype.
        strength: α in [0, 1].

    Raises ValueError for shapes that do not fit.
    """
    if not weights or any(weight.ndim != 2 or weight.shape[1:] != spread.shape for weight in weights):
        raise ValueError(f"weights must be (O, {len(spread)}), got {[tuple(weight.shape) for weight in weights]}")
    r = spread.float()
    largest = 2 * torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
    scales = torch.where(largest > 0, r.pow(strength) / largest.pow(1 - strength), r)
    return scales.clamp(min=_LEAST)
