"""Linear layers that stay dense, as the head does, by a kernel of our own for a few tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armor_recipes.runtime.kernel import has_dense, run_dense_kernel

#: Tokens for which the kernel is faster than torch's product, in bfloat16 with AVX-512.
_MOST_TOKENS = 8
#: Weights below which the call costs more than the product.
_WORTH = 1 << 18


class DenseLinear(nn.Linear):
    """An `nn.Linear` whose bfloat16 products of a few tokens on a CPU are those of `run_dense_kernel`; else it is torch's.

    Made from one in place (`adopt`): parameters, names and hooks stay as they are.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Compute `(..., O)` from `input` `(..., I)`."""
        weight = self.weight
        ours = weight.dtype == torch.bfloat16 and weight.is_contiguous() and suits_kernel(input)
        return run_dense_kernel(input, weight, self.bias) if ours else super().forward(input)


def is_worth(weights: int) -> bool:
    """Whether a layer of so many weights is large enough for the kernel."""
    return weights >= _WORTH


def suits_kernel(x: Tensor) -> bool:
    """Whether `run_dense_kernel` takes x `(..., I)` here, and is faster than torch's product."""
    few = 0 < x.numel() <= _MOST_TOKENS * x.shape[-1] and x.is_cpu and x.dtype == torch.bfloat16
    plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
    return few and plain and has_dense()


def adopt_dense(model: nn.Module) -> int:
    """Make every plain linear layer of a model on the CPU, in bfloat16 and worth it, a `DenseLinear`; returns their number."""
    found = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.is_cpu
        and module.weight.dtype == torch.bfloat16
        and is_worth(module.weight.numel())
    ]
    for module in found:
        module.__class__ = DenseLinear
    return len(found)
