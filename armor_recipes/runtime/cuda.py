"""The backend `cuda`: `A (S (B x)) + bias` on a GPU by Triton kernels (`armor_recipes.runtime.triton_kernel`).

| tokens | B and A | S |
|---|---|---|
| up to 16 | a kernel each, A's adds up the parts of S B x | a kernel, on the core as `runtime.fragments` lays it out |
| more | the same kernel | another one unpacks the core in each call, for a dense product |

Float32 layers, which are there to compare with, take the second row for all numbers of tokens. Torch's semi-structured tensors
are not used: each call of theirs kept the CPU busy for 0.6 ms and more, longer than an H100 needs for 8192 tokens and a
4096x4096 weight (`docs/benchmarks/h100.md`).

`torch.compile` and CUDA graphs take a layer whole: where a graph is traced it is the operator `armor_recipes::cuda_linear`, else
the launches themselves, past the dispatcher. Neither waits for the GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import RecipeError
from armor_recipes.runtime.fragments import Fragments, lay_out
from armor_recipes.runtime.validation import check_numbers, check_packed
from armor_recipes.solver.blockdiag import apply_input_factor, apply_output_factor
from armor_recipes.solver.sweep import triton_available

MOST_TOKENS = 16
"""Of one call of the kernel on the laid out core: the wider tile of the two that it is compiled for."""


def prepare_cuda(packed: PackedLinear, name: str) -> Fragments | None:
    """Check the layer, and lay its core out for few tokens; None of a float32 layer.

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
    return None if packed.dtype == torch.float32 else lay_out(packed)


def run_cuda(x: Tensor, prepared: Fragments | None, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    """Compute `A (S (B x)) + bias` `(..., O)` from x `(..., I)` in the layer's dtype.

    Differentiable in x and all floats: where one of them wants a gradient the layer is computed by plain torch, which unpacks
    the core in each forward pass. Inside `torch.autocast` the layer keeps its dtype, and the output comes in autocast's.
    """
    if torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            y = run_cuda(x.to(packed.dtype), prepared, packed, bias)
        return y.to(torch.get_autocast_dtype(x.device.type))
    parts = packed.values, packed.bitmask, packed.a, packed.b, packed.scale, bias
    if torch.is_grad_enabled() and any(part is not None and part.requires_grad for part in (x, *parts)):
        core = packed.unpack()[0].to(packed.dtype)
        y = apply_output_factor(nn.functional.linear(apply_input_factor(x, packed.b), core), packed.a)
        return y if bias is None else y + bias
    laid = (None, None, 0) if prepared is None else (prepared.words, prepared.scale, prepared.parts)
    if torch.compiler.is_compiling():
        traced: Tensor = torch.ops.armor_recipes.cuda_linear(x, *parts, *laid)
        return traced
    return _compute(x, *parts, *laid)


def _compute(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    words: Tensor | None,
    words_scale: Tensor | None,
    words_parts: int,
) -> Tensor:
    from armor_recipes.runtime.triton_kernel import apply_factor, run_core, unpack_core  # imports Triton
    from armor_recipes.runtime.tuning import core_plan

    packed = PackedLinear(values, bitmask, a, b, scale)
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    inner = apply_factor(flat, b)
    if words is None or flat.shape[0] > MOST_TOKENS:
        y = apply_factor(nn.functional.linear(inner, unpack_core(packed)), a, bias)
    else:
        plan = core_plan(packed, flat.shape[0])
        y = run_core(inner, Fragments(words, words_scale, words_parts), packed, plan)
        if not plan.fused:
            y = apply_factor(y, a, bias, splits=plan.splits)
        elif bias is not None:
            y += bias
    return y.reshape(*x.shape[:-1], a.shape[0] * a.shape[1])


_operator = torch.library.custom_op("armor_recipes::cuda_linear", _compute, mutates_args=())


@_operator.register_fake
def _(
    x: Tensor,
    values: Tensor,  # noqa: ARG001
    bitmask: Tensor,  # noqa: ARG001
    a: Tensor,
    b: Tensor,  # noqa: ARG001
    scale: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    words: Tensor | None,  # noqa: ARG001
    words_scale: Tensor | None,  # noqa: ARG001
    words_parts: int,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(*x.shape[:-1], a.shape[0] * a.shape[1])


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
