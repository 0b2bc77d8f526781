"""The backend `cuda`: `A (S (B x)) + bias` on a GPU, A and B by batched products, S by the number of tokens.

| tokens | S |
|---|---|
| up to 16 | the Triton kernel, straight from the packed core (`armor_recipes.runtime.triton_kernel`) |
| more | a copy of the core made once: torch's semi-structured tensor where cuSPARSELt can take it, else dense |
"""

from __future__ import annotations

import importlib.util
import warnings

import torch
from torch import Tensor, nn

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import RecipeError
from armor_recipes.solver.blockdiag import apply_input_factor, apply_output_factor

MOST_TOKENS = 16
"""Of one call of the Triton kernel: the narrowest tile that a tensor core multiplies."""
#: What cuSPARSELt asks of a 16-bit 2:4 matrix: rows and columns in multiples of this, and this compute capability.
_MULTIPLE, _CAPABILITY = 16, (8, 0)


@torch.no_grad()
def prepare_cuda(packed: PackedLinear, name: str) -> Tensor:
    """Make the copy of the core `(O, I)` that many tokens are multiplied with, in the dtype of the layer's floats.

    Args:
        packed: the layer, on a CUDA device.
        name: the module's, for messages.

    Raises:
        RecipeError: if the layer is on another device, or Triton is not installed.
        CheckpointError: if the tensors break the format.
    """
    _check_device(packed.values.device, name)
    if importlib.util.find_spec("triton") is None:
        raise RecipeError(
            f"{name}: the backend cuda needs Triton, which is not installed: `pip install triton`, or choose `folded`"
        )
    core = packed.unpack(name=name)[0].to(packed.dtype)
    return _semi_structured(core) if _fits_cusparselt(core) else core


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run_cuda(x: Tensor, core: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """Compute `A (S (B x)) + bias` `(..., O)` from x `(..., I)` in the layer's dtype; `core` is what `prepare_cuda` made.

    Differentiable in x and all floats: where a gradient passes through S, the core is unpacked in each forward pass.
    """
    y = apply_output_factor(_core_product(apply_input_factor(x, packed.b), core, packed), packed.a)
    return y if bias is None else y + bias


def _core_product(x: Tensor, core: Tensor, packed: PackedLinear) -> Tensor:
    """`S x` `(..., O)`."""
    parts = (x, packed.values, packed.scale)
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in parts):
        return nn.functional.linear(x, packed.unpack()[0].to(packed.dtype))
    flat = x.reshape(-1, x.shape[-1])
    y = _run_kernel(flat, packed) if flat.shape[0] <= MOST_TOKENS else nn.functional.linear(flat, core)
    return y.reshape(*x.shape[:-1], packed.shape[0])


def _run_kernel(x: Tensor, packed: PackedLinear) -> Tensor:
    from armor_recipes.runtime.triton_kernel import run_core  # imports Triton

    return run_core(x, packed)


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


def _fits_cusparselt(core: Tensor) -> bool:
    """Whether torch can make a semi-structured tensor of `core` here, and multiply with it."""
    return (
        core.dtype in (torch.bfloat16, torch.float16)
        and all(side % _MULTIPLE == 0 for side in core.shape)
        and torch.backends.cusparselt.is_available()
        and torch.cuda.get_device_capability(core.device) >= _CAPABILITY
    )


def _semi_structured(core: Tensor) -> Tensor:
    with warnings.catch_warnings():
        # Torch announces once that this interface may change, which is nothing that a user of the layer could act on.
        warnings.filterwarnings("ignore", "The PyTorch API of SparseSemiStructuredTensor", UserWarning)
        return torch.sparse.to_sparse_semi_structured(core)
