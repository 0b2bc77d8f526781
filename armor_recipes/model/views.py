"""Views of a module: other parts in some places, all else shared. The module itself is never touched, so that threads may
run several views of one module at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def view(module: M, replacements: Mapping[str, nn.Module | Tensor], *, copied: Sequence[str] = ()) -> M:
    """Copy the module along the paths of `replacements` (name from the module → what stands there), and share the rest.

    Tensors stand for parameters, and gradients flow into them. Modules named in `copied` are copied, too, so that hooks can be put
    on them. Raises KeyError where a module on a path does not exist.
    """
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
