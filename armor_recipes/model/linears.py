"""Linear modules on the module tree."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def tied_to(model: nn.Module, name: str) -> str | None:
    """The first other name of a linear module, or of a parameter that is its weight; None where it stands alone."""
    linear = model.get_submodule(name)
    modules = model.named_modules(remove_duplicate=False)
    parameters: Iterable[tuple[str, nn.Parameter]] = model.named_parameters(remove_duplicate=False)
    found = [other for other, module in modules if module is linear and other != name]
    found += [other for other, value in parameters if value is linear.weight and other != f"{name}.weight"]
    return found[0] if found else None
