"""Linear modules on the module tree, and what shares their weights: found in one pass, however many there are."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

#: Outputs and inputs of the weight that a linear layer's own code is tried on.
_TRIED = (8, 4)


class Place(NamedTuple):
    """Where a weight stands: the full name of the module that holds it, the module's class, and the weight's name in it."""

    module: str
    kind: str
    parameter: str
    linear: bool

    @property
    def described(self) -> str:
        """The place in words."""
        own = self.module if self.parameter == "weight" else f"{self.module}.{self.parameter}"
        return f"{own} ({self.kind})"


@dataclass(frozen=True, slots=True, eq=False)
class Linears:
    """The linear modules of a model by name, in the model's order, and the places of those weights that have several.

    A module that stands at several places has a name at each of them.
    """

    modules: Mapping[str, nn.Linear]
    _places: Mapping[int, tuple[Place, ...]]

    def places(self, name: str) -> tuple[Place, ...]:
        """All places of a linear module's weight, in the model's order; none where it stands alone."""
        return self._places.get(id(self.modules[name].weight), ())

    def others(self, name: str) -> tuple[Place, ...]:
        """The places of a linear module's weight besides its own."""
        return tuple(place for place in self.places(name) if (place.module, place.parameter) != (name, "weight"))


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer and no more: one whose class has a forward pass of its own is tried on a small weight.

    A router that also chooses experts, or a layer that multiplies in groups, is a subclass of `nn.Linear` that something else could
    not stand for.
    """
    if not isinstance(module, nn.Linear):
        return False
    return type(module).forward is nn.Linear.forward or _multiplies_plainly(module)


def _multiplies_plainly(module: nn.Linear) -> bool:
    """Whether the module's own forward pass, with a small weight in the place of its own, gives x Wᵀ + b but for rounding."""
    outputs, inputs = _TRIED
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator) for size in ((outputs, inputs), outputs, (2, 3, inputs)))
    trial = copy.copy(module)
    trial._parameters = dict(module._parameters)
    trial.weight = nn.Parameter(weight)
    trial.bias = None if module.bias is None else nn.Parameter(bias)
    trial.out_features, trial.in_features = outputs, inputs
    try:
        with torch.no_grad():
            found = type(module).forward(trial, x)
    except Exception:  # whatever the class's code meets first in a weight of another size
        return False
    wanted = nn.functional.linear(x, weight, trial.bias)
    return isinstance(found, Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, atol=1e-5)


def find_linears(model: nn.Module) -> Linears:
    """Look at every module once. The result holds as long as no weight is replaced."""
    places: dict[int, list[Place]] = {}
    modules: dict[str, nn.Linear] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Linear):
            modules[name] = module
        for own, value in module.named_parameters(recurse=False, remove_duplicate=False):
            linear = isinstance(module, nn.Linear) and own == "weight"
            places.setdefault(id(value), []).append(Place(name, type(module).__name__, own, linear))
    return Linears(modules, {key: tuple(found) for key, found in places.items() if len(found) > 1})


def linears_that_share(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """For each linear module whose weight is another linear module's too, or that stands at several places, all of their names."""
    linears = find_linears(model)
    found = {name: tuple(place.module for place in linears.places(name) if place.linear) for name in linears.modules}
    return {name: places for name, places in found.items() if len(places) > 1}
