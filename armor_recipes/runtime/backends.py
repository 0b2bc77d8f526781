"""How a layer is computed. A backend turns the packed tensors into what it needs once, and then runs from that.

| backend | prepared | forward |
|---|---|---|
| `folded` | Ŵ = A·S·B, rounded to the layer's dtype | `F.linear(x, Ŵ, bias)`, bit for bit a plain linear layer |
| `reference` | S, unpacked, in the layer's dtype | `A (S (B x)) + bias`, in plain torch, Bx in 8 bits where config.json says so |
| `cpu` | nothing: the packed tensors are checked | the compiled kernel, straight from the packed tensors |
| `cuda` | the core in the order in which its kernel reads it | Triton kernels; many tokens: S unpacked by one of them |
| `auto` | as `cpu` where that can run, else as `folded` | what was fastest for this shape and number of tokens |

Of layers with 8-bit activations `auto` runs as `reference` does, `cpu` and `cuda` refuse them, and `folded` is of their weights
alone: it leaves activations as they are, as an export to dense does. fp8 cores are refused by `cpu` and `cuda`, too.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import RecipeError
from armor_recipes.runtime.auto import KEEP_VARIABLE, AutoCall, DenseCores
from armor_recipes.runtime.cuda import prepare_cuda, run_cuda
from armor_recipes.runtime.kernel import FORMATS, PATH_VARIABLE, KernelCall, kernel_available
from armor_recipes.runtime.op import linear
from armor_recipes.runtime.validation import check_numbers, check_packed, has_numbers
from armor_recipes.solver.activations import round_activations
from armor_recipes.solver.blockdiag import apply_input_factor, apply_output_factor

BACKEND_VARIABLE = "ARMOR_BACKEND"
DEFAULT_BACKEND = "auto"


@dataclass(frozen=True, slots=True)
class Backend:
    """Two pure functions. `run` is differentiable in x, the values and the factors."""

    name: str
    prepare: Callable[[PackedLinear, str], Any]
    """`(packed, module name) -> prepared`, computed once for as long as the packed tensors stay as they are."""
    run: Callable[[Tensor, Any, PackedLinear, Tensor | None], Tensor]
    """`(x (..., I), prepared, packed, bias (O,) or None) -> y (..., O)`."""
    traced: Callable[[PackedLinear, Any], bool] = lambda *_: False
    """Whether `torch.compile` can trace `run`, for these tensors and what was prepared of them before, None where nothing was."""
    call: Callable[[Any, PackedLinear, Tensor | None], Callable[[Tensor], Tensor] | None] = lambda *_: None
    """`(prepared, packed, bias)` to what computes y from x alone, without gradients, for many calls; None where `run` is all."""


def choose_backend(name: str | None = None) -> Backend:
    """Take the backend called `name`, or named by ARMOR_BACKEND, or the default. Raises `RecipeError` if it is unknown."""
    chosen = name or os.environ.get(BACKEND_VARIABLE) or DEFAULT_BACKEND
    if chosen not in BACKENDS:
        source = "backend" if name else f"environment variable {BACKEND_VARIABLE}"
        raise RecipeError(f"{source} {chosen!r} is unknown: choose one of {', '.join(sorted(BACKENDS))}")
    return BACKENDS[chosen]


def _fold(packed: PackedLinear, name: str) -> Tensor:
    weight = packed.fold(packed.dtype, name=name)
    # A parameter, as in a plain layer: of inputs that are not contiguous torch makes other products if a weight wants gradients,
    # even where none are computed.
    return weight if weight.requires_grad else nn.Parameter(weight)


def _run_folded(x: Tensor, weight: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    if torch.is_grad_enabled() and weight.is_leaf:  # prepared once: it gets no gradient
        weight = weight.detach()
    return nn.functional.linear(x, weight, bias)


def _unpack(packed: PackedLinear, name: str) -> Tensor:
    return packed.unpack(name=name)[0].to(packed.dtype)


def _run_reference(x: Tensor, core: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    inner = apply_input_factor(x, packed.b)
    if packed.activations is not None:
        inner = round_activations(inner, packed.activations)
    y = apply_output_factor(nn.functional.linear(inner, core), packed.a)
    return y if bias is None else y + bias


def _check_for_kernel(packed: PackedLinear, name: str) -> None:
    """Check the layer, and that the kernel can run it. Raises `RecipeError` where it cannot, and `CheckpointError`."""
    if not kernel_available():
        raise RecipeError(
            f"{name}: the backend cpu needs the compiled kernel, which was not built for lack of a C compiler: install "
            "one and install armor-recipes again, or choose `folded`"
        )
    check_numbers(packed, name, "cpu")
    if packed.values.device.type != "cpu":
        raise RecipeError(f"{name} is on {packed.values.device}: the backend cpu runs on the CPU; choose `folded`")
    check_packed(packed, name=name)


def _run_cpu(x: Tensor, prepared: None, packed: PackedLinear, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return linear(x, packed, bias, backend="cpu")


@dataclass(frozen=True, slots=True)
class _Unpacked:
    """S in the layer's dtype, where `auto` runs as `reference` does."""

    core: Tensor


def _prepare_auto(packed: PackedLinear, name: str) -> Tensor | DenseCores | _Unpacked:
    if packed.activations is not None:
        return _Unpacked(_unpack(packed, name))
    if packed.values.device.type == "cpu" and not kernel_available():
        warnings.warn(
            "armor-recipes was installed without a C compiler, so that its CPU kernel is missing: ARMOR layers run "
            "folded, which takes more memory and time. Install a compiler and install armor-recipes again",
            stacklevel=2,
        )
    if not _has_kernel(packed) or _trains(packed):
        return _fold(packed, name)
    check_packed(packed, name=name)
    return DenseCores()


def _run_auto(
    x: Tensor, prepared: Tensor | DenseCores | _Unpacked | None, packed: PackedLinear, bias: Tensor | None
) -> Tensor:
    if isinstance(prepared, _Unpacked):
        return _run_reference(x, prepared.core, packed, bias)
    if isinstance(prepared, Tensor):
        return _run_folded(x, prepared, packed, bias)
    return linear(x, packed, bias, backend="auto", cores=prepared)


def _call_auto(
    prepared: Tensor | DenseCores | _Unpacked | None, packed: PackedLinear, bias: Tensor | None
) -> AutoCall | None:
    return AutoCall(packed, bias, prepared) if isinstance(prepared, DenseCores) else None


def environment() -> tuple[str | None, ...]:
    """What variables say that choose how layers are computed."""
    return tuple(map(os.environ.get, (BACKEND_VARIABLE, PATH_VARIABLE, KEEP_VARIABLE)))


def _has_kernel(packed: PackedLinear) -> bool:
    return packed.values.device.type == "cpu" and packed.dtype in FORMATS and kernel_available() and has_numbers(packed)


def wants_gradients(packed: PackedLinear) -> bool:
    """Whether a packed tensor is trained."""
    tensors = (packed.values, packed.a, packed.b, packed.scale)
    return any(tensor.requires_grad for tensor in tensors if tensor is not None)


def _trains(packed: PackedLinear) -> bool:
    """Whether a backward pass wants gradients of the packed tensors, which dense products give faster."""
    return torch.is_grad_enabled() and wants_gradients(packed)


BACKENDS = {
    "auto": Backend("auto", _prepare_auto, _run_auto, traced=lambda packed, _: _has_kernel(packed), call=_call_auto),
    "cpu": Backend(
        "cpu",
        _check_for_kernel,
        _run_cpu,
        traced=lambda packed, _: has_numbers(packed),
        call=lambda _, *layer: KernelCall(*layer),
    ),
    "cuda": Backend(
        "cuda",
        prepare_cuda,
        run_cuda,
        traced=lambda _, prepared: prepared is not None,
        call=lambda *layer: lambda x: run_cuda(x, *layer),
    ),
    "folded": Backend("folded", _fold, _run_folded),
    "reference": Backend("reference", _unpack, _run_reference),
}
