"""Give modules their linear form in place, and put back what they were."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from armor_recipes.model.forms.experts import (
    LinearDbrxExperts,
    LinearExpert,
    LinearExperts,
    LinearLlama4Experts,
    LinearParallelExperts,
    dbrx_layout,
    experts_layout,
    llama4_layout,
    parallel_layout,
)
from armor_recipes.model.forms.layout import Converted, Layout, Slice

_RECORD = "_linear_form"


class _Form(NamedTuple):
    becomes: type[nn.Module]
    layout: Callable[[nn.Module], Layout | None]
    """That of a module of this kind; None for any other."""


def conv1d_layout(module: nn.Module) -> Layout | None:
    """Transformers' `Conv1D`: a linear layer whose weight is `(I, O)`."""
    if type(module).__name__ != "Conv1D" or not hasattr(module, "nx"):
        return None
    return Layout({"weight": tuple(module.get_parameter("weight").shape)}, {"weight": Slice("weight", transposed=True)})


_FORMS = (
    _Form(nn.Linear, conv1d_layout),
    _Form(LinearDbrxExperts, dbrx_layout),
    _Form(LinearLlama4Experts, llama4_layout),
    _Form(LinearParallelExperts, parallel_layout),
    _Form(LinearExperts, experts_layout),
)


def layouts(model: nn.Module) -> dict[str, Layout]:
    """Layouts of the modules that were given a linear form, by full name."""
    return {name: record.layout for name, module in model.named_modules() if (record := _record(module)) is not None}


def linearise(model: nn.Module, names: Collection[str] | None = None) -> tuple[str, ...]:
    """Give modules a linear form in place: all that can have one, or those named. The same function, within rounding.

    Values are copied module by module, so that memory for one module is needed besides; a meta model stays one.

    Returns:
        Full names of the modules that were changed, in the model's order. Those that are linear already are not among them.
    """
    found = [candidate for candidate in _candidates(model) if names is None or candidate[0] in names]
    for _, module, form, layout in found:
        _convert(module, form, layout)
    return tuple(name for name, _, _, _ in found)


def restore(model: nn.Module, names: Collection[str] | None = None) -> tuple[str, ...]:
    """The inverse of `linearise`, for all modules with a linear form or those named.

    One whose layers are no plain `nn.Linear`s (packed, or with adapters on them) stays as it is.

    Returns:
        Full names of the modules that were changed, in the model's order.
    """
    found = [(name, m) for name, m in model.named_modules() if _record(m) and (names is None or name in names)]
    return tuple(name for name, module in found if _restored(module))


def forms_of(model: nn.Module, linears: Iterable[str]) -> tuple[str, ...]:
    """Full names of the modules that have, or must be given, a linear form for these linear layers to exist, in order."""
    known = {name: layout for name, _, _, layout in _candidates(model)} | layouts(model)
    needed = {form for name in linears if (form := _form_of(name, known)) is not None}
    return tuple(name for name, _ in model.named_modules() if name in needed)


def linear_parts(model: nn.Module) -> dict[str, tuple[tuple[int, int], str]]:
    """Map each layer that `linearise` would make → its weight's shape `(O, I)` and the full name of the fused parameter."""
    found = {}
    for name, _, _, layout in _candidates(model):
        for part, piece in layout.parts.items():
            if part.rpartition(".")[2] == "weight":
                rows, columns = layout.shape(part)
                found[f"{name}.{part}".rpartition(".")[0]] = (rows, columns), f"{name}.{piece.parameter}"
    return found


def fused_names(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, tuple[str, ...]]:
    """Map full name of a fused parameter → the linear layers that stand for it, of those modules that are in linear form."""
    found: dict[str, list[str]] = {}
    for name, module in modules:
        record = _record(module)
        for part, piece in record.layout.parts.items() if record else ():
            linear = f"{name}.{part}".rpartition(".")[0]
            found.setdefault(f"{name}.{piece.parameter}", []).append(linear)
    return {name: tuple(parts) for name, parts in found.items()}


def fused_state(model: nn.Module) -> dict[str, Tensor]:
    """`model.state_dict()` on the meta device as it would be without linear forms."""
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in model.state_dict().items()}
    for name, layout in layouts(model).items():
        likes = {piece.parameter: state.pop(f"{name}.{part}") for part, piece in layout.parts.items()}
        state |= {f"{name}.{fused}": like.new_empty(layout.fused[fused]) for fused, like in likes.items()}
    return state


def fused_keys(model: nn.Module) -> dict[str, None]:
    """Names of `fused_state`, in no order that means anything."""
    keys = dict.fromkeys(model.state_dict())
    for name, layout in layouts(model).items():
        for part in layout.parts:
            del keys[f"{name}.{part}"]
        keys |= dict.fromkeys(f"{name}.{fused}" for fused in layout.fused)
    return keys


def _record(module: nn.Module) -> Converted | None:
    return cast("Converted | None", module.__dict__.get(_RECORD))


def _candidates(model: nn.Module) -> list[tuple[str, nn.Module, _Form, Layout]]:
    """Modules that can be given a linear form, in the model's order."""
    found = []
    for name, module in model.named_modules():
        for form in _FORMS:
            layout = form.layout(module)
            if layout is not None:
                found.append((name, module, form, layout))
                break
    return found


def _form_of(linear: str, known: dict[str, Layout]) -> str | None:
    """The module of `known` that the layer belongs to."""
    above = linear
    while above:
        if above in known and _part(linear, above) in known[above].parts:
            return above
        above = above.rpartition(".")[0]
    return None


def _part(linear: str, form: str) -> str:
    return f"{linear}.weight".removeprefix(f"{form}.")


@torch.no_grad()
def _convert(module: nn.Module, form: _Form, layout: Layout) -> None:
    held = {name: module.get_parameter(name) for name in layout.fused}
    for name in held:
        path, _, last = name.rpartition(".")
        del module.get_submodule(path)._parameters[last]
    module.__dict__[_RECORD] = Converted(type(module), layout)
    module.__class__ = form.becomes
    for part, piece in layout.parts.items():
        fused = held[piece.parameter]
        # On the meta device without views, of which a mixture of many experts has a hundred thousand.
        value = fused.new_empty(layout.shape(part)) if fused.is_meta else _copy(piece.read(fused))
        path, _, last = part.rpartition(".")
        linear = _linear_at(module, path)
        linear.register_parameter(last, nn.Parameter(value, requires_grad=fused.requires_grad))
        if last == "weight":
            linear.out_features, linear.in_features = value.shape  # type: ignore[assignment]


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _linear_at(module: nn.Module, path: str) -> nn.Module:
    """The layer of that name, made where there is none, without initialising what is replaced at once."""
    *above, last = path.split(".") if path else ("",)
    for name, kind in (*((name, LinearExpert) for name in above), (last, nn.Linear)) if last else ():
        if name not in module._modules:
            module.add_module(name, _bare(kind, training=module.training))
        module = cast("nn.Module", module._modules[name])
    return module


def _bare(kind: type[nn.Module], *, training: bool) -> nn.Module:
    made = kind.__new__(kind)
    nn.Module.__init__(made)
    made.training = training
    if kind is nn.Linear:
        made.register_parameter("bias", None)
    return made


@torch.no_grad()
def _restored(module: nn.Module) -> bool:
    record = cast("Converted", _record(module))
    layout = record.layout
    if any(type(module.get_submodule(path)) is not nn.Linear for path in layout.linears):
        return False
    fused: dict[str, Tensor] = {}
    grads: dict[str, bool] = {}
    for part, piece in layout.parts.items():
        value = module.get_parameter(part)
        if piece.parameter not in fused:
            fused[piece.parameter] = value.new_empty(layout.fused[piece.parameter])
        piece.write(fused[piece.parameter], value.detach())
        grads[piece.parameter] = value.requires_grad
    for child in {part.partition(".")[0] for part in layout.parts if "." in part}:
        del module._modules[child]
    for name in ("in_features", "out_features") if record.original.__name__ == "Conv1D" else ():
        module.__dict__.pop(name, None)
    del module.__dict__[_RECORD]
    module.__class__ = record.original
    for name, tensor in fused.items():
        path, _, last = name.rpartition(".")
        owner = module.get_submodule(path)
        owner._parameters.pop(last, None)
        owner.register_parameter(last, nn.Parameter(tensor, requires_grad=grads[name]))
    return True
