"""Whether the layers of a loaded model are slower on this machine than dense ones would be: measured once, as it is loaded."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from armor_recipes.runtime.linear import ArmorLinear

#: Backends that are there to be fast on a CPU.
_FAST = ("auto", "cpu")
#: A layer is slower where it takes so many times as long; less is noise.
_SLOWER = 1.1
#: Seconds a token that slower layers have to lose together before it is told.
_FELT = 1e-3
#: Weights of a layer that is worth a measurement: a call of a smaller one takes longer than its products, in either form.
_SMALL = 1 << 18
#: Times are the shortest of so many, taken in turns, and of fewer once they have taken so many seconds.
_TURNS, _LONG = 5, 0.2


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds for one token, of a layer and of a dense one of its shape and dtype."""

    layer: float
    dense: float

    @property
    def ratio(self) -> float:
        """How many times as long the layer takes."""
        return self.layer / self.dense


def warn_where_slower(layers: Mapping[str, ArmorLinear], measure: Callable[[ArmorLinear], Times] | None = None) -> None:
    """Warn once for all layers of a model, by name, that are slower for one token than dense ones, if that can be felt.

    One layer of each shape, block size and core is measured, on the CPU with the backends `auto` and `cpu` alone: `folded` is a
    dense layer, `reference` is no fast one, and `cuda` is chosen for its memory. It takes as long as a few tokens.
    """
    times = _times(layers, measure or times_of)
    slower = {name: found for name, found in times.items() if found.ratio > _SLOWER}
    if sum(found.layer - found.dense for found in slower.values()) < _FELT:
        return
    worst = max(slower, key=lambda name: slower[name].ratio)
    together = sum(found.layer for found in times.values()) / sum(found.dense for found in times.values())
    warnings.warn(
        f"{len(slower)} of {len(times)} ARMOR layers take longer here than dense layers of their shape, for one token and "
        f"{torch.get_num_threads()} threads: {slower[worst].ratio:.2f} times as long at most ({worst}), all together "
        f"{together:.2f} times. Load with backend='folded' to have the speed, and the memory, of dense layers",
        stacklevel=3,
    )


def _times(layers: Mapping[str, ArmorLinear], measure: Callable[[ArmorLinear], Times]) -> dict[str, Times]:
    """Of each layer that is to be fast: those of the first one like it."""
    known: dict[tuple[object, ...], Times] = {}
    found = {}
    for name, layer in layers.items():
        packed = layer.packed()
        rows, columns = packed.shape
        if layer.backend not in _FAST or packed.values.device.type != "cpu" or rows * columns < _SMALL:
            continue
        alike = (packed.shape, packed.block_size, packed.dtype, packed.core, packed.group_size, packed.activations)
        if alike not in known:
            known[alike] = measure(layer)
        found[name] = known[alike]
    return found


@torch.no_grad()
def times_of(layer: ArmorLinear) -> Times:
    """Measure a layer on the CPU against a dense one, on made-up numbers."""
    packed = layer.packed()
    x = torch.full((1, packed.shape[1]), 0.5, dtype=packed.dtype, device="cpu")
    weight = torch.full(packed.shape, 0.5, dtype=packed.dtype, device="cpu")
    return Times(*_shortest([lambda: layer(x), lambda: nn.functional.linear(x, weight)]))


def _shortest(ways: Sequence[Callable[[], object]]) -> list[float]:
    for way in ways:
        way()  # warms up, and lets `auto` choose
    found = [float("inf")] * len(ways)
    begun = time.perf_counter()
    for _ in range(_TURNS):
        for place, way in enumerate(ways):
            started = time.perf_counter()
            way()
            found[place] = min(found[place], time.perf_counter() - started)
        if time.perf_counter() - begun > _LONG:
            break
    return found
