"""`A · S · B` as something that gradients flow into: A, the kept values of S, and B; masks stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.solver.blockdiag import fold, left_multiply, right_multiply


class TrainableFactors(nn.Module):
    """Parameters `a` `(J, b_o, b_o)`, `values` (kept entries of S, row by row), `b` `(K, b_i, b_i)`; buffers `mask` `(O, I)`
    and `kept`, where in the flat mask they are (int32, which bounds a weight to 2^31 entries).

    They start as the very numbers that are given, so that factors which no step changes pack to the same bits again. A common
    scale of S and A makes no difference to steps that are relative to each tensor's root mean square.
    """

    mask: Tensor
    kept: Tensor

    def __init__(self, a: Tensor, core: Tensor, mask: Tensor, b: Tensor) -> None:
        super().__init__()
        self.a, self.values, self.b = (nn.Parameter(part.detach().float().clone()) for part in (a, core[mask], b))
        self.register_buffer("mask", mask)
        self.register_buffer("kept", mask.flatten().nonzero()[:, 0].to(torch.int32))

    def weight(self) -> Tensor:
        """Ŵ float32 `(O, I)`, differentiable in the three parameters; keeps nothing of its size for the backward pass."""
        folded: Tensor = _Fold.apply(self.a, self.values, self.b, self.mask, self.kept)  # type: ignore[no-untyped-call]
        return folded

    @property
    def core(self) -> Tensor:
        """S float32 `(O, I)`, detached."""
        return _spread(self.values.detach(), self.mask)


class _Fold(torch.autograd.Function):
    """`fold` of the spread-out values; the backward pass makes S and S·B again rather than keeping them."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, values: Tensor, b: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
        ctx.save_for_backward(a, values, b, mask, kept)
        return fold(a, _spread(values, mask), b)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        (gradient,) = gradients
        a, values, b, mask, kept = ctx.saved_tensors
        core = _spread(values, mask)
        rows = gradient.reshape(a.shape[0], a.shape[1], -1)
        in_a = torch.bmm(rows, right_multiply(core, b).view(rows.shape).mT)
        in_t = left_multiply(a.mT, gradient)
        in_values = right_multiply(in_t, b.mT).flatten().index_select(0, kept)
        return in_a, in_values, torch.bmm(_columns(core, b).mT, _columns(in_t, b)), None, None


def _spread(values: Tensor, mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter_(mask, values)


def _columns(x: Tensor, b: Tensor) -> Tensor:
    """View `(O, I)` as `(K, O, b_i)`."""
    return x.view(x.shape[0], b.shape[0], b.shape[-1]).transpose(0, 1)
