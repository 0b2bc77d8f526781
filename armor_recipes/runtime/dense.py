"""`DenseLinear`: a linear layer that stays dense, as the head does, by a kernel of our own for a few tokens."""

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
        few = 0 < input.numel() <= _MOST_TOKENS * weight.shape[1]
        plain = not (torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))
        ours = (
            few and plain and input.dtype == weight.dtype == torch.bfloat16 and input.is_cpu and weight.is_contiguous()
        )
        return run_dense_kernel(input, weight, self.bias) if ours and has_dense() else super().forward(input)


def adopt_dense(model: nn.Module) -> int:
    """Make every plain linear layer of a model on the CPU, in bfloat16 and worth it, a `DenseLinear`; returns their number."""
    found = [
        module
        for module in model.modules()
        if type(module) is nn.Linear
        and module.weight.is_cpu
        and module.weight.dtype == torch.bfloat16
        and module.weight.numel() >= _WORTH
    ]
    for module in found:
        module.__class__ = DenseLinear
    return len(found)
