"""Views of a module: other parts in some places, all else shared. The module itself is never touched, so that threads may
run several views of one module at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
V = TypeVar("V")


def view(module: M, replacements: Mapping[str, nn.Module | Tensor], *, copied: Sequence[str] = ()) -> M:
    """Copy the module along the paths of `replacements` (name from the module → what stands there), and share the rest.

    Tensors stand for parameters, and gradients flow into them. Modules named in `copied` are copied, too, so that hooks can be put
    on them. Raises KeyError where a module on a path does not exist.
    """
    if isinstance(whole := replacements.get(""), nn.Module):
        return whole  # type: ignore[return-value]  # of another class, as parts are
    below: dict[str, dict[str, nn.Module | Tensor]] = defaultdict(dict)
    inner_copied: dict[str, list[str]] = defaultdict(list)
    for name in copied:
        first, _, rest = name.partition(".")
        inner_copied[first] += [rest] if rest else []
    found = _shallow(module)
    for name, part in replacements.items():
        first, _, rest = name.partition(".")
        if rest:
            below[first][rest] = part
        elif isinstance(part, nn.Module):
            found._modules[first] = part
        else:
            found._parameters[first] = part  # type: ignore[assignment]  # as torch.func.functional_call puts plain tensors there
    for first in dict.fromkeys([*below, *inner_copied]):
        child = module._modules[first]
        assert child is not None
        found._modules[first] = view(child, below[first], copied=inner_copied[first])
    return found


def _shallow(module: M) -> M:
    """Copy the object and its own dictionaries (parameters, modules, hooks), and nothing that they hold."""
    found = type(module).__new__(type(module))
    found.__dict__.update(
        {key: value.copy() if isinstance(value, dict) else value for key, value in module.__dict__.items()}
    )
    return found


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the module's own parameters: those of an embedding alone would cost a fifth of a small model's step."""
    wanted = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def dense_view(model: M, dense: Mapping[str, Tensor], copied: Sequence[str] = ()) -> M:
    """The model with other parameters, by name, in the place of its own, which may hold anything.

    Weights of linear layers are kept in the dtype that they come in and widened when they are used. Hooks on modules are the
    view's, too.
    """
    parts: dict[str, nn.Module | Tensor] = {}
    for name, value in dense.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, nn.Linear) and leaf == "weight":
            parts[owner] = _WidenedLinear(value, module)
        else:
            parts[name] = value.to(model.get_parameter(name).dtype)
    return view(model, parts, copied=copied)


def shared_names(model: nn.Module, values: Mapping[str, V]) -> Iterator[tuple[str, V]]:
    """Each name of a parameter with its value, and all other names of the same parameter with it."""
    others: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        others[id(parameter)].append(name)
    for name, value in values.items():
        for other in others[id(model.get_parameter(name))]:
            yield other, value


class _WidenedLinear(nn.Module):
    """A linear layer with another weight `(O, I)`, which may be of a narrower dtype than its input."""

    def __init__(self, weight: Tensor, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = linear.bias
        self.out_features, self.in_features = weight.shape
        for kind in ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks"):
            getattr(self, kind).update(getattr(linear, kind))

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)
