"""How a layer is computed. A backend turns the packed tensors into what it needs once, and then runs from that.

| backend | prepared | forward |
|---|---|---|
| `folded` | Ŵ = A·S·B, rounded to the layer's dtype | `F.linear(x, Ŵ, bias)`, bit for bit a plain linear layer |
| `reference` | S, unpacked | `A (S (B x)) + bias`, in plain torch |
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import RecipeError
from armor_recipes.solver.blockdiag import apply_input_factor, apply_output_factor

BACKEND_VARIABLE = "ARMOR_BACKEND"
DEFAULT_BACKEND = "folded"


@dataclass(frozen=True, slots=True)
class Backend:
    """Two pure functions. Both are differentiable in the values and the factors."""

    name: str
    prepare: Callable[[PackedLinear, str], Tensor]
    """`(packed, module name) -> prepared`, computed once for as long as the packed tensors stay as they are."""
    run: Callable[[Tensor, Tensor, PackedLinear, Tensor | None], Tensor]
    """`(x (..., I), prepared, packed, bias (O,) or None) -> y (..., O)`."""


def choose_backend(name: str | None = None) -> Backend:
    """Take the backend called `name`, or named by ARMOR_BACKEND, or `folded`. Raises `RecipeError` if it is unknown."""
    chosen = name or os.environ.get(BACKEND_VARIABLE) or DEFAULT_BACKEND
    if chosen not in BACKENDS:
        source = "backend" if name else f"environment variable {BACKEND_VARIABLE}"
        raise RecipeError(f"{source} {chosen!r} is unknown: choose one of {', '.join(sorted(BACKENDS))}")
    return BACKENDS[chosen]


def _fold(packed: PackedLinear, name: str) -> Tensor:
    return packed.fold(packed.values.dtype, name=name)


def _run_folded(x: Tensor, weight: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:  # noqa: ARG001
    return nn.functional.linear(x, weight, bias)


def _unpack(packed: PackedLinear, name: str) -> Tensor:
    return packed.unpack(name=name)[0]


def _run_reference(x: Tensor, core: Tensor, packed: PackedLinear, bias: Tensor | None) -> Tensor:
    y = apply_output_factor(nn.functional.linear(apply_input_factor(x, packed.b), core), packed.a)
    return y if bias is None else y + bias


BACKENDS = {
    "folded": Backend("folded", _fold, _run_folded),
    "reference": Backend("reference", _unpack, _run_reference),
}
