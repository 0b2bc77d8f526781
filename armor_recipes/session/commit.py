"""The one place where a run changes anything: weights of the model, and what the run has come to."""

from __future__ import annotations

from dataclasses import replace
from math import isfinite

from torch import Tensor

from armor_recipes.checkpoint.quantized import QuantizedLinear
from armor_recipes.compute.scratch import Scratch
from armor_recipes.errors import CheckpointError, NumericalError
from armor_recipes.model.finite import ADVICE, is_finite
from armor_recipes.model.store import WeightStore
from armor_recipes.modifiers.kinds.changes import Changes
from armor_recipes.modifiers.kinds.contract import State


def commit(changes: Changes, weights: WeightStore, state: State) -> None:
    """Write the weights and add the rest to the state.

    Raises ValueError, before it writes, on a weight of another shape, and NumericalError on one, or on a loss, that is not finite.
    """
    for name, value in changes.weights.items():
        own = weights.read(name)
        if own.shape != value.shape:
            raise ValueError(
                f"{changes.step}: {name} is {tuple(own.shape)}, and {tuple(value.shape)} was to be written"
            )
    _check_finite(changes)
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


def keep(changes: Changes, state: State, scratch: Scratch, known: dict[int, Tensor]) -> None:
    """Let the state hold the factors of what was committed in files: in the scratch, but for the ids of tensors `known` in one."""
    for name, factors in scratch.keep_all(changes.factors, known).items():
        if factors is not None:
            state.factors[name] = factors
            if name in state.modules and state.modules[name].packed is not None:
                state.modules[name] = replace(state.modules[name], packed=factors)


def commit_recorded(changes: Changes, weights: WeightStore, state: State) -> None:
    """`commit` of what was read again. Raises CheckpointError where it is not of this model."""
    try:
        commit(changes, weights, state)
    except (AttributeError, KeyError, ValueError) as error:
        raise CheckpointError(
            f"the recorded step {changes.step} does not fit the model ({error}): pass --fresh to start over"
        ) from error


def _check_finite(changes: Changes) -> None:
    """What every solver promises of itself, of whatever a modifier or a plug-in gives."""
    for name, value in changes.weights.items():
        if not is_finite(value):
            count = int((~value.isfinite()).sum())
            raise NumericalError(
                f"{changes.step}: {count} of {value.numel()} new numbers of {name} are not finite; nothing of it was taken "
                f"over: {ADVICE}"
            )
    for name, result in changes.modules.items():
        for loss in (*result.losses, result.stored_loss, result.error):
            if not isfinite(loss):
                raise NumericalError(
                    f"{changes.step}: a loss of {name} is {loss}; nothing of it was taken over: {ADVICE}"
                )


def _run_as_stored(name: str, layer: QuantizedLinear | None, weights: WeightStore) -> None:
    """Let a module's activations be quantised as those of the layer are when it is loaded."""
    quantizer = None if layer is None else layer.activations(weights.read(f"{name}.weight").dtype)
    before, after = (None, None) if quantizer is None else quantizer.hooks
    weights.change_activations(name, before, after)
