"""`armor_recipes::linear`: the cpu kernel as an operator of torch, with a shape function and gradients.

So `torch.compile` traces through it, and an adapter (LoRA, say) trains on top of a layer that runs on it. The backward pass
is plain torch: it unpacks the core, so to train the factors themselves the backend `reference` is faster. The integers and scales
of a quantised core get no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import RecipeError
from armor_recipes.runtime.auto import DenseCores, run_auto
from armor_recipes.runtime.kernel import run_kernel
from armor_recipes.solver.blockdiag import apply_input_factor, apply_output_factor


def linear(
    x: Tensor, packed: PackedLinear, bias: Tensor | None, *, backend: str, cores: DenseCores | None = None
) -> Tensor:
    """Compute `A (S (B x)) + bias` `(..., O)`; past the dispatcher, which costs tens of microseconds, where nothing needs it.

    `backend` is `cpu`, the kernel whatever the number of tokens, or `auto`, the fastest way, with the layer's `cores` if it
    keeps them. Differentiable in x, float values, A, B and bias. Inside `torch.autocast` x is taken, and the output given, in
    autocast's dtype, as by a linear layer; the layer keeps its own dtype and sums in float32.

    Raises what `run_kernel` raises, and in a backward pass `RecipeError` where the scales of a quantised core are trained.
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
        with torch.autocast(x.device.type, enabled=False):
            return linear(x, packed, bias, backend=backend, cores=cores)
    tensors = (x, packed.values, packed.bitmask, packed.a, packed.b, packed.scale, bias)
    grads = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    if grads or torch.compiler.is_compiling():
        y: Tensor = torch.ops.armor_recipes.linear(*tensors, backend)
        return y
    return run_kernel(x, packed, bias) if backend == "cpu" else run_auto(x, packed, bias, cores)


@torch.library.custom_op("armor_recipes::linear", mutates_args=(), device_types="cpu")
def _linear(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    backend: str,
) -> Tensor:
    packed = PackedLinear(values, bitmask, a, b, scale)
    y = run_kernel(x, packed, bias) if backend == "cpu" else run_auto(x, packed, bias)
    return y if y._base is None else y.clone()  # a view could not be changed in place by who trains on it


@_linear.register_fake
def _(
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,  # noqa: ARG001
    a: Tensor,  # noqa: ARG001
    b: Tensor,  # noqa: ARG001
    scale: Tensor | None,  # noqa: ARG001
    bias: Tensor | None,  # noqa: ARG001
    backend: str,  # noqa: ARG001
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


@torch.library.custom_op("armor_recipes::linear_backward", mutates_args=())
def _linear_backward(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor | None,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, values, a and b: those `wanted`, empty tensors for the others (no autograd inside an operator)."""
    core, mask = PackedLinear(values, bitmask, a, b, scale).unpack()
    wide = torch.promote_types(x.dtype, a.dtype)  # under autocast the layer's dtype need not be x's
    core, a_wide, b_wide = (tensor.to(wide) for tensor in (core, a, b))
    flat, upstream = (tensor.reshape(-1, tensor.shape[-1]).to(wide) for tensor in (x, grad))
    inner = apply_input_factor(flat, b_wide)
    inner_grad = apply_output_factor(upstream, a_wide.mT)
    input_grad = inner_grad @ core
    found = (
        lambda: apply_input_factor(input_grad, b_wide.mT).view_as(x).to(x.dtype),
        lambda: (inner_grad.mT @ inner)[mask].view_as(values).to(values.dtype),
        lambda: _block_outer(upstream, inner @ core.mT, a).to(a.dtype),
        lambda: _block_outer(input_grad, flat, b).to(b.dtype),
    )
    return [made() if need else grad.new_empty(0) for made, need in zip(found, wanted, strict=True)]  # type: ignore[no-untyped-call]


def _block_outer(left: Tensor, right: Tensor, like: Tensor) -> Tensor:
    """The gradient of a block-diagonal factor: the blocks of leftᵀ · right."""
    blocks = like.shape[:2]
    return torch.einsum("tki,tkj->kij", left.unflatten(-1, blocks), right.unflatten(-1, blocks))


@_linear_backward.register_fake
def _(
    grad: Tensor,
    x: Tensor,
    values: Tensor,
    bitmask: Tensor,  # noqa: ARG001
    a: Tensor,
    b: Tensor,
    scale: Tensor | None,  # noqa: ARG001
    wanted: Sequence[bool],
) -> list[Tensor]:
    return [
        torch.empty_like(t) if need else grad.new_empty(0) for t, need in zip((x, values, a, b), wanted, strict=True)
    ]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(*inputs[:6])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    need_x, need_values, _, need_a, need_b, need_scale, need_bias, _ = ctx.needs_input_grad
    if need_scale:
        raise RecipeError(
            "the backends cpu and auto compute no gradient of weight_scale: choose `reference` to train it, or freeze it"
        )
    wanted = [need_x, need_values, need_a, need_b]
    found = (
        torch.ops.armor_recipes.linear_backward(grad, *ctx.saved_tensors, wanted)
        if any(wanted)
        else [grad.new_empty(0)] * 4
    )
    x, values, a, b = (gradient if need else None for gradient, need in zip(found, wanted, strict=True))
    bias = grad.flatten(0, -2).sum(0) if need_bias else None  # autograd casts it to the bias's dtype
    return x, values, None, a, b, None, bias, None


_linear.register_autograd(_backward, setup_context=_save)
