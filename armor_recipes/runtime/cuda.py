"""The backend `cuda`: `A (S (B x)) + bias` on a GPU, A and B by batched products, S by the number of tokens.

| tokens | S (`armor_recipes.runtime.triton_kernel`) |
|---|---|
| up to 16 | a Triton kernel, straight from the packed core |
| more | another one unpacks the core in each call, for a dense product |

Torch's semi-structured tensors are not used: each call of theirs kept the CPU busy for 0.6 ms and more, longer than an H100
needs for 8192 tokens and a 4096x4096 weight, and they would be a second copy of the core (`docs/benchmarks/h100.md`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import RecipeError
from armor_recipes.runtime.validation import check_numbers, check_packed
from armor_recipes.solver.blockdiag import apply_input_factor, apply_output_factor
from armor_recipes.solver.sweep import triton_available

MOST_TOKENS = 16
"""Of one call of the Triton kernel: the narrowest tile that a tensor core multiplies."""


def prepare_cuda(packed: PackedLinear, name: str) -> None:
    """Check the layer; nothing is kept beside the packed tensors.

    Args:
        packed: the layer, on a CUDA device.
        name: the module's, for messages.

    Raises:
        RecipeError: if the layer is on another device, or Triton is not installed.
        CheckpointError: if the tensors break the format.
    """
    _check_device(packed.values.device, name)
    if not triton_available():
        raise RecipeError(
            f"{name}: the backend cuda needs Triton, which is not installed: `pip install triton`, or choose `folded`"
        )
    check_numbers(packed, name, "cuda")
    check_packed(packed, name=name)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run_cuda(x: Tensor, prepared: None, packed: PackedLinear, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    """Compute `A (S (B x)) + bias` `(..., O)` from x `(..., I)` in the layer's dtype.

    Differentiable in x and all floats: where a gradient passes through S, the core is unpacked in each forward pass. Inside
    `torch.autocast` the layer keeps its dtype, and the output comes in autocast's.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            y: Tensor = run_cuda(x.to(packed.dtype), None, packed, bias)
        return y.to(torch.get_autocast_dtype(x.device.type))
    y = apply_output_factor(_core_product(apply_input_factor(x, packed.b), packed), packed.a)
    return y if bias is None else y + bias


def _core_product(x: Tensor, packed: PackedLinear) -> Tensor:
    """`S x` `(..., O)`."""
    parts = (x, packed.values, packed.scale)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts):
        return nn.functional.linear(x, packed.unpack()[0].to(packed.dtype))
    from armor_recipes.runtime.triton_kernel import run_core, unpack_core  # imports Triton

    flat = x.reshape(-1, x.shape[-1])
    few = flat.shape[0] <= MOST_TOKENS
    y = run_core(flat, packed) if few else nn.functional.linear(flat, unpack_core(packed))
    return y.reshape(*x.shape[:-1], packed.shape[0])


def _check_device(device: torch.device, name: str) -> None:
    if device.type == "cuda":
        return
    if not torch.cuda.is_available():
        raise RecipeError(
            f"{name}: the backend cuda needs a CUDA GPU, and torch {torch.__version__} sees none: install a GPU driver and a "
            "CUDA build of torch, or choose `cpu`, `auto` or `folded`"
        )
    raise RecipeError(
        f'{name} is on {device}: the backend cuda runs on a CUDA device; load with device="cuda", move the model there '
        "first, or choose `cpu`, `auto` or `folded`"
    )
