"""`A · S · B` as something that gradients flow into: A, the kept values of S, and B; masks stay."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.solver.activations import round_activations
from armor_recipes.solver.blockdiag import fold
from armor_recipes.solver.sparse import SparseCore


class TrainableFactors(nn.Module):
    """Parameters `a` `(J, b_o, b_o)` and `b` `(K, b_i, b_i)`, and after `train_core` `values`, the kept entries of S row by
    row; `mask` `(O, I)` and `core`, S in float32 `(O, I)`.

    `dtype` is that of the products, float32 or bfloat16: there A, S and B are rounded to it for each product, and so is what comes
    out; parameters and their gradients are float32 in any case. As long as S is not trained, its float32 products take half the
    multiplications on a CPU (`SparseCore`) where its numbers are bfloat16 ones, as those of a bfloat16 checkpoint are.

    Where `activations` is `int8` or `fp8`, Bx is rounded as such a layer rounds it when it runs, and gradients pass as if it were
    not.

    They start as the very numbers that are given, so that factors which no step changes pack to the same bits again. A common
    scale of S and A makes no difference to steps that are relative to each tensor's root mean square.
    """

    a: nn.Parameter
    b: nn.Parameter
    values: nn.Parameter | None
    mask: Tensor
    _core: Tensor | None
    _sparse: SparseCore | None

    def __init__(
        self,
        a: Tensor,
        core: Tensor,
        mask: Tensor,
        b: Tensor,
        dtype: torch.dtype = torch.float32,
        activations: str | None = None,
    ) -> None:
        super().__init__()
        self.dtype, self.activations = dtype, activations
        self.a, self.b = (nn.Parameter(part.detach().float().clone()) for part in (a, b))
        self.register_buffer("mask", mask)
        self._sparse = SparseCore.of(core.detach(), mask) if dtype == torch.float32 else None
        self.register_buffer("_core", _narrowest(core.detach(), dtype) if self._sparse is None else None)
        self.register_parameter("values", None)

    @property
    def core(self) -> Tensor:
        """S float32 `(O, I)`, zero where nothing is kept."""
        if self._core is not None:
            return self._core.float()
        assert self._sparse is not None
        return self._sparse.forward.dense()

    def train_core(self) -> None:
        """Make the kept values of S a parameter too."""
        core = self.core
        self._core, self._sparse = core, None
        self.values = nn.Parameter(core[self.mask])

    def refresh(self) -> None:
        """Make S again from its values; to be called whenever they have changed."""
        if self.values is not None:
            self._core = torch.zeros_like(self.core).masked_scatter_(self.mask, self.values.detach())

    def weight(self) -> Tensor:
        """Ŵ float32 `(O, I)`, detached."""
        return fold(self.a.detach(), self.core, self.b.detach())

    def product(self, x: Tensor) -> Tensor:
        """`A (S (B x))` `(..., O)` for x `(..., I)`, of `dtype`, differentiable in x and in what wants gradients.

        No weight is folded, and no gradient of a weight's size is made unless the values are trained.
        """
        core = self._sparse if self._core is None else self._core.to(self.dtype)
        rows: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
            x.flatten(0, -2), self.a, self.values, self.b, core, self.mask, self.activations
        )
        return rows.view(*x.shape[:-1], -1)


class TrainableLinear(nn.Module):
    """Stands where a linear layer stood and computes `A (S (B x)) + bias` from factors that are trained, in x's dtype."""

    def __init__(self, factors: TrainableFactors, bias: Tensor | None) -> None:
        super().__init__()
        self.factors = factors
        self.bias = bias
        self.out_features, self.in_features = factors.mask.shape

    @property
    def weight(self) -> Tensor:
        """Ŵ, for models that look at the weight of a layer."""
        return self.factors.weight()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Compute `(..., O)` from `input` `(..., I)`."""
        y = self.factors.product(input.to(self.factors.dtype))
        return (y if self.bias is None else y + self.bias).to(input.dtype)


class _Product(torch.autograd.Function):
    """Rows x `(T, I)` to A(S(Bx)) `(T, O)`. Keeps x and S(Bx) for the backward pass, and makes Bx again.

    Both are kept in bfloat16: they serve the gradients of A, S and B alone, whose noise from one batch to the next is far above
    that rounding, and would else be a third of a step's memory. The gradient in x does not depend on them. The products are those
    of x's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: Tensor,
        values: Tensor | None,  # noqa: ARG004 - here for its gradient
        b: Tensor,
        core: Tensor | SparseCore,
        mask: Tensor,
        activations: str | None,
    ) -> Tensor:
        inner = _blocks(x, b.to(x.dtype))
        if activations is not None:
            inner = round_activations(inner, activations)
        y = core.forward.times(inner) if isinstance(core, SparseCore) else inner @ core.T
        ctx.core = core
        ctx.save_for_backward(x.bfloat16(), y.bfloat16(), a, b, mask)
        return _blocks(y, a.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        *rough, mask = ctx.saved_tensors
        x, y, a, b = (part.to(gradient.dtype) for part in rough)
        wanted = ctx.needs_input_grad
        in_a = _outer(gradient, y, a).float() if wanted[1] else None
        in_y = _blocks(gradient, a.mT)
        in_values = (in_y.T @ _blocks(x, b))[mask].float() if wanted[2] else None
        in_bx = ctx.core.backward.times(in_y) if isinstance(ctx.core, SparseCore) else in_y @ ctx.core
        in_b = _outer(in_bx, x, b).float() if wanted[3] else None
        in_x = _blocks(in_bx, b.mT) if wanted[0] else None
        return in_x, in_a, in_values, in_b, None, None, None


def _narrowest(core: Tensor, dtype: torch.dtype) -> Tensor:
    """S in the dtype of its products where that holds it exactly, else in float32."""
    rounded = core.to(dtype)
    return rounded if torch.equal(rounded.to(core.dtype), core) else core.float()


def _blocks(x: Tensor, blocks: Tensor) -> Tensor:
    """Block k `(b, b)` times part k of each row of x `(T, K·b)`."""
    return torch.bmm(_parts(x, blocks), blocks.mT).transpose(0, 1).reshape(x.shape)


def _outer(left: Tensor, right: Tensor, blocks: Tensor) -> Tensor:
    """Sum over the rows of `left_k right_kᵀ`, `(K, b, b)`."""
    return torch.bmm(_parts(left, blocks).mT, _parts(right, blocks))


def _parts(x: Tensor, blocks: Tensor) -> Tensor:
    """View `(T, K·b)` as `(K, T, b)`."""
    return x.view(x.shape[0], blocks.shape[0], blocks.shape[-1]).transpose(0, 1)
