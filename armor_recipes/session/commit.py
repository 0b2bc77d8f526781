"""The one place where a run changes anything: weights of the model, and what the run has come to."""

from __future__ import annotations

from dataclasses import replace

from armor_recipes.checkpoint.quantized import QuantizedLinear
from armor_recipes.model.store import WeightStore
from armor_recipes.modifiers.kinds.changes import Changes
from armor_recipes.modifiers.kinds.contract import State


def commit(changes: Changes, weights: WeightStore, state: State) -> None:
    """Write the weights and add the rest to the state. Raises ValueError, before it writes, on a weight of another shape."""
    for name, value in changes.weights.items():
        own = weights.read(name)
        if own.shape != value.shape:
            raise ValueError(
                f"{changes.step}: {name} is {tuple(own.shape)}, and {tuple(value.shape)} was to be written"
            )
    for name, value in changes.weights.items():
        weights.write(name, value, same_function=changes.same_function)
    for name, factors in changes.factors.items():
        if factors is None:
            state.factors.pop(name, None)
        else:
            state.factors[name] = factors
    state.sharing |= changes.sharing
    state.gradients |= changes.gradients
    for name, result in changes.modules.items():
        kept = changes.factors[name] if changes.packed and name in changes.factors else None
        state.modules[name] = replace(result, packed=kept, quantized=changes.quantized.get(name))
        _run_as_stored(name, changes.quantized.get(name), weights)
    for name, cache in changes.caches.items():
        weights.change_cache(name, cache.states)
    state.caches |= changes.caches
    state.results += changes.results


def _run_as_stored(name: str, layer: QuantizedLinear | None, weights: WeightStore) -> None:
    """Let a module's activations be quantised as those of the layer are when it is loaded."""
    quantizer = None if layer is None else layer.activations(weights.read(f"{name}.weight").dtype)
    before, after = (None, None) if quantizer is None else quantizer.hooks
    weights.change_activations(name, before, after)
