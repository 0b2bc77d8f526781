"""Experts whose weights transformers fuses into one parameter, as linear layers `N.gate_proj`, `N.up_proj`, `N.down_proj`.

The layout follows the flags that transformers' `use_experts_implementation` leaves on such modules (transformers 5.24,
`integrations/moe.py`), and what its "eager" loop computes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.model.forms.layout import Converted, Layout, Slice

DOWN = "down_proj"
_FLAGS = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}


class LinearExpert(nn.Module):
    """One expert: holds `up_proj`, `down_proj` and, where experts are gated, `gate_proj`. The module above calls them."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module


class LinearExperts(nn.Module):
    """Experts as linear layers; everything else of the module (activation, limits, norm) is as the architecture made it.

    Made in place by `linearise`, so the class of the architecture is not among its bases: what initialises a module of that class
    would look for the fused parameters.
    """

    _linear_form: Converted
    num_experts: int
    act_fn: nn.Module
    post_expert_norm: nn.Module
    every_expert: bool = False
    """Whether each expert is called on all tokens, so that hooks see them; what is not routed to it is left out of the sum."""

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Weighted sum of each token's experts.

        Args:
            hidden_states: `(…, H)`, T tokens in all.
            routing: numbers of the experts `(T, K)`, and their weights `(T, K)`; an expert past the last is left out.
            named: the same where the architecture calls by names.

        Returns:
            Of the shape and dtype of `hidden_states`.
        """
        index, weights = (*routing, *named.values())
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        total = torch.zeros_like(tokens, dtype=torch.promote_types(tokens.dtype, weights.dtype))
        for number in range(self.num_experts) if self.every_expert else index.unique().tolist():
            if number >= self.num_experts:
                continue
            token, slot = torch.where(index == number)  # in the order of the tokens, as statistics expect rows
            found = self._expert(number, tokens)[token] if self.every_expert else self._expert(number, tokens[token])
            total.index_add_(0, token, (found * weights[token, slot, None]).to(total.dtype))
        return total.to(hidden_states.dtype).view(hidden_states.shape)

    def _expert(self, number: int, x: Tensor) -> Tensor:
        """What one expert makes of its tokens `(t, H)`."""
        expert: Any = self._modules[str(number)]
        up = expert.up_proj(x)
        inner = self._gated(expert.gate_proj(x), up) if _flag(self, "has_gate") else self.act_fn(up)
        found: Tensor = expert.down_proj(inner)
        return self.post_expert_norm(found) if getattr(self, "has_post_expert_norm", False) else found

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """The architecture's own gate, on both halves as the fused weights give them."""
        own = getattr(self._linear_form.original, "_apply_gate", None)
        if own is None:
            halves: Tensor = self.act_fn(gate) * up
            return halves
        both = torch.cat((gate, up), -1) if _flag(self, "is_concatenated") else torch.stack((gate, up), -1).flatten(-2)
        found: Tensor = own(self, both)
        return found


class LinearDbrxExperts(LinearExperts):
    """DBRX's, whose weights lie in a module below, stacked in two dimensions."""

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        mlp: Any = self.mlp
        found: Tensor = mlp.activation_fn(gate) * up
        return found


class LinearLlama4Experts(nn.Module):
    """Llama 4's, each of which gets all tokens, scaled by its score: rows of zeros where the token is not for it."""

    _linear_form: Converted
    num_experts: int
    act_fn: nn.Module

    def forward(self, hidden_states: Tensor) -> Tensor:
        """`(E·T, H)` → the same shape; an expert is called on the rows that are not zero, of which it would make zeros."""
        rows = hidden_states.reshape(self.num_experts, -1, hidden_states.shape[-1])
        found = torch.zeros_like(rows)
        for number in range(self.num_experts):
            used = rows[number].any(-1)
            if bool(used.any()):
                expert: Any = self._modules[str(number)]
                x = rows[number][used]
                found[number, used] = expert.down_proj(self.act_fn(expert.gate_proj(x)) * expert.up_proj(x))
        return found.view(hidden_states.shape)


class LinearParallelExperts(nn.Module):
    """JetMoe's: one projection of each expert, `N` below the module."""

    _linear_form: Converted
    num_experts: int

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        """`(T, I)`, the first `expert_size[0]` rows for expert 0 and so on → `(T, O)`."""
        pieces = inputs.split(expert_size, dim=0)
        found = [module(x) for module, x in zip(self._modules.values(), pieces, strict=True) if module and len(x)]
        return torch.cat(found) if found else inputs.new_zeros(0, self.output_size)  # type: ignore[call-overload]


def experts_layout(module: nn.Module) -> Layout | None:
    """That of experts with fused `gate_up_proj` or `up_proj`, and `down_proj`; None for any other module."""
    gated = _flag(module, "has_gate")
    first = "gate_up_proj" if gated else "up_proj"
    fused = _shapes(module, first, DOWN)
    if len(fused) != 2 or not (hasattr(module, "has_gate") or hasattr(module, "_apply_gate")):
        return None
    if any(len(shape) != 3 for shape in fused.values()) or len({shape[0] for shape in fused.values()}) != 1:
        return None
    if getattr(module, "num_experts", None) != fused[DOWN][0]:
        return None
    biased = _flag(module, "has_bias")
    fused |= _shapes(module, f"{first}_bias", f"{DOWN}_bias") if biased else {}
    parts: dict[str, Slice] = {}
    for number in range(fused[DOWN][0]):
        parts |= _of_expert(module, number, first, fused, biased=biased)
    return Layout(fused, parts)


def _of_expert(
    module: nn.Module, number: int, first: str, fused: dict[str, tuple[int, ...]], *, biased: bool
) -> dict[str, Slice]:
    transposed = _flag(module, "is_transposed")
    width = fused[first][2 if transposed else 1]
    halves = {"up_proj": slice(None)} if first == "up_proj" else _halves(width, _flag(module, "is_concatenated"))
    parts = {}
    for name, half in halves.items():
        index = (number, slice(None), half) if transposed else (number, half)
        parts[f"{number}.{name}.weight"] = Slice(first, index, transposed)
        if biased:
            parts[f"{number}.{name}.bias"] = Slice(f"{first}_bias", (number, half))
    parts[f"{number}.{DOWN}.weight"] = Slice(DOWN, (number,), transposed)
    if biased:
        parts[f"{number}.{DOWN}.bias"] = Slice(f"{DOWN}_bias", (number,))
    return parts


def _halves(width: int, concatenated: bool) -> dict[str, slice]:
    if concatenated:
        return {"gate_proj": slice(0, width // 2), "up_proj": slice(width // 2, width)}
    return {"gate_proj": slice(0, width, 2), "up_proj": slice(1, width, 2)}


def dbrx_layout(module: nn.Module) -> Layout | None:
    """DBRX: gate `w1`, up `v1` `(E·I, H)`, and `w2` `(E·I, H)`, which is applied transposed."""
    if type(module).__name__ != "DbrxExperts":
        return None
    fused = _shapes(module, "mlp.w1", "mlp.v1", "mlp.w2")
    count = int(module.num_experts)  # type: ignore[arg-type]
    width = fused["mlp.w1"][0] // count
    parts = {}
    for number in range(count):
        rows = (slice(number * width, (number + 1) * width),)
        parts[f"{number}.gate_proj.weight"] = Slice("mlp.w1", rows)
        parts[f"{number}.up_proj.weight"] = Slice("mlp.v1", rows)
        parts[f"{number}.{DOWN}.weight"] = Slice("mlp.w2", rows, transposed=True)
    return Layout(fused, parts)


def llama4_layout(module: nn.Module) -> Layout | None:
    """Llama 4: `gate_up_proj` `(E, H, 2I)` and `down_proj` `(E, I, H)`, both transposed."""
    if type(module).__name__ != "Llama4TextExperts":
        return None
    fused = _shapes(module, "gate_up_proj", DOWN)
    count, _, width = fused["gate_up_proj"]
    parts = {}
    for number in range(count):
        for name, half in _halves(width, concatenated=True).items():
            parts[f"{number}.{name}.weight"] = Slice("gate_up_proj", (number, slice(None), half), transposed=True)
        parts[f"{number}.{DOWN}.weight"] = Slice(DOWN, (number,), transposed=True)
    return Layout(fused, parts)


def parallel_layout(module: nn.Module) -> Layout | None:
    """JetMoe: `weight` `(E, O, I)`."""
    if not type(module).__name__.endswith("ParallelExperts"):
        return None
    fused = _shapes(module, "weight")
    if len(fused.get("weight", ())) != 3:
        return None
    return Layout(fused, {f"{number}.weight": Slice("weight", (number,)) for number in range(fused["weight"][0])})


def _shapes(module: nn.Module, *names: str) -> dict[str, tuple[int, ...]]:
    """Shapes of those of the parameters that the module has."""
    found = {}
    for name in names:
        path, _, last = name.rpartition(".")
        parameter = module.get_submodule(path)._parameters.get(last)
        if parameter is not None:
            found[name] = tuple(parameter.shape)
    return found


def _flag(module: nn.Module, name: str) -> bool:
    return bool(getattr(module, name, _FLAGS[name]))
