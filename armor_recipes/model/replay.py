"""Activations at the door of a stack, and its blocks run one by one on them."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.calibration.inputs import TOKENS, Batch, arguments, leading, some_of
from armor_recipes.compute import is_out_of_memory
from armor_recipes.errors import InputError, NumericalError, PlanError
from armor_recipes.model.blocks import Stack
from armor_recipes.model.hooks import Hooks, input_of

#: A replayed layer must reproduce the model's own activations up to this share of their norm.
_REPLAY_TOLERANCE = 1e-3
#: In the place of hidden states that are not kept.
_NOTHING = torch.empty(0)


class _StopForwardError(Exception):
    """Raised by a hook once the inputs that are asked for are in hand; never leaves this module."""


@dataclass(frozen=True, slots=True)
class LayerCall:
    """One call of a decoder layer: its arguments without the hidden states, and those `(B, L, H)` by themselves."""

    hidden: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    by_name: bool

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerCall:
        """Split a layer's arguments as the model passes them: hidden states first, or by the name `hidden_states`."""
        if args:
            return cls(args[0], args[1:], dict(kwargs), by_name=False)
        rest = dict(kwargs)
        return cls(rest.pop("hidden_states"), (), rest, by_name=True)

    def run(self, layer: Callable[..., Any]) -> Tensor:
        """The layer's output hidden states `(B, L, H)`."""
        if self.by_name:
            out = layer(hidden_states=self.hidden, **self.kwargs)
        else:
            out = layer(self.hidden, *self.args, **self.kwargs)
        hidden = hidden_states(out)
        assert isinstance(hidden, Tensor)
        return hidden

    def part(self, windows: slice) -> LayerCall:
        """The call for some windows of the batch: their share of each tensor of the arguments whose first dimension is the batch's.

        Which tensors these are is a guess by their shape; `comes_apart` says whether it is right.
        """
        batch = len(self.hidden)

        def part(value: Any) -> Any:
            if isinstance(value, Tensor):
                return value[windows] if batch > 1 and value.ndim and len(value) == batch else value
            if type(value) is dict:
                return {key: part(inner) for key, inner in value.items()}
            return type(value)(map(part, value)) if type(value) in (tuple, list) else value

        return LayerCall(part(self.hidden), part(self.args), part(self.kwargs), self.by_name)

    def comes_apart(self, layer: Callable[..., Any], parts: Sequence[slice]) -> bool:
        """Whether the layer gives for these parts of the batch what it gives for all of it, token by token but for rounding."""
        whole = self.run(layer)
        try:
            joined = torch.cat([self.part(windows).run(layer) for windows in parts])
        except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            return False
        if joined.shape != whole.shape:
            return False
        tolerance = max(_REPLAY_TOLERANCE, 4 * torch.finfo(whole.dtype).eps)
        errors, sizes = (x.float().norm(dim=-1) for x in (joined - whole, whole))
        return bool((errors <= tolerance * sizes).all())


class Stream:
    """The activations of one calibration set: what every batch brings to the next layer, with the arguments that go along.

    Most models pass every layer the same arguments; then only the first layer's are kept. Where they differ (sliding and
    full attention in turn, say), each layer's own are.

    Attributes:
        batches: what the model was called with.
        hidden: activations of each batch at the door of the next layer, `(B, L, H)`.
    """

    def __init__(self, calls: list[list[LayerCall]], stack: Stack, batches: Sequence[Batch]) -> None:
        self._calls = [[replace(call, hidden=_NOTHING) for call in batch] for batch in calls]
        self._stack = stack
        self.batches = tuple(batches)
        self.hidden = [batch[0].hidden for batch in calls]

    def call(self, layer: int, batch: int) -> LayerCall:
        """What layer `layer` is called with for a batch; `hidden` must have come as far as that layer."""
        calls = self._calls[batch]
        return replace(calls[min(layer - self._stack.first, len(calls) - 1)], hidden=self.hidden[batch])

    def calls(self, layer: int) -> Iterator[LayerCall]:
        """`call` for each batch in turn."""
        for batch in range(len(self.hidden)):
            yield self.call(layer, batch)

    def run(self, layer: int) -> Iterator[Tensor]:
        """Run layer `layer` on every batch; yields its outputs and leaves the stream where it is."""
        for call in self.calls(layer):
            yield call.run(self._stack.block(layer))

    def observe(self, layer: int) -> None:
        """Run layer `layer` on every batch for its hooks' sake."""
        for _ in self.run(layer):
            pass

    def advance(self, layer: int) -> None:
        """Replace the activations by layer `layer`'s outputs."""
        for index, output in enumerate(self.run(layer)):
            self.hidden[index] = output


def capture_stream(model: nn.Module, stack: Stack, inputs: Batch, *, batch_size: int, hooks: Hooks) -> Stream:
    """Take the first layer's inputs for every batch of `inputs`; the model's forward pass is stopped there.

    The first sample goes through the whole model once, to see whether all layers get the same arguments and whether
    running the layers one by one gives the model's own activations. Raises PlanError where it does not.
    """
    probe, output = _probe(model, stack, some_of(inputs, slice(1)), hooks)
    _check_replay(model, stack, probe, hidden_states(output))
    same = all(_same_arguments(probe[0], call) for call in probe[1:])
    total = len(leading(inputs))
    parts = [on_device(some_of(inputs, slice(i, i + batch_size)), model) for i in range(0, total, batch_size)]
    calls = [_run_model(model, stack, batch, hooks, through=not same)[0] for batch in parts]
    return Stream(calls, stack, parts)


def _probe(model: nn.Module, stack: Stack, sample: Batch, hooks: Hooks) -> tuple[list[LayerCall], Any]:
    """The first pass of a sample through the whole model. Raises InputError where the model's own code fails."""
    try:
        return _run_model(model, stack, sample, hooks, through=True)
    except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{type(model).__name__}: its forward pass fails on {_shapes(sample)} "
            f"({type(error).__name__}: {reason}): its config.json does not describe a model that runs"
        ) from error


def _shapes(sample: Batch) -> str:
    if sample.keys() == {TOKENS}:
        return f"a window of {sample[TOKENS].shape[1]} tokens"
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sample.items())


def input_groups(model: nn.Module, stack: Stack, names: Sequence[str], batch: Batch, hooks: Hooks) -> dict[str, str]:
    """For each module the first of `names` that reads the very same tensor in one pass of `batch`, often itself.

    Modules that no pass reaches stand for themselves, as do those called more than once. They come in the order in which they
    are first called, those that are never called last. No input is kept longer than the model keeps it.
    """
    seen: dict[str, list[int]] = {name: [] for name in names}
    called: dict[str, None] = {}
    numbers = _Numbers()

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called[name] = None
            seen[name].append(numbers.of(input_of(args, kwargs)))

        return hook

    with hooks:
        for name in names:
            hooks.before(model.get_submodule(name), keep(name))
        _run_model(model, stack, batch, hooks, through=True)
    first: dict[int, str] = {}
    found = {name: first.setdefault(inputs[0], name) if len(inputs) == 1 else name for name, inputs in seen.items()}
    return {name: found[name] for name in dict.fromkeys((*called, *names))}


class _Numbers:
    """A number for each tensor, the same as long as it lives: an `id` alone is given again once its tensor is gone."""

    def __init__(self) -> None:
        self._alive: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._next = 0

    def of(self, x: Tensor) -> int:
        """The tensor's number."""
        known = self._alive.get(id(x))
        if known is not None and known[0]() is x:
            return known[1]
        self._next += 1
        self._alive[id(x)] = weakref.ref(x), self._next
        return self._next


def inputs_of(module: nn.Module, call: LayerCall, layer: nn.Module, hooks: Hooks, *, once: bool) -> list[Tensor]:
    """What a module inside a layer reads while the layer runs `call`, a tensor for each time that it is called.

    With `once` the layer is stopped there.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(input_of(args, kwargs))
        if once:
            raise _StopForwardError

    with hooks, suppress(_StopForwardError):
        hooks.before(module, keep)
        call.run(layer)
    return seen


def feed(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch on its device."""
    takes_cache = "use_cache" in inspect.signature(type(model).forward).parameters
    named = arguments(batch)
    return model(**named, use_cache=False) if takes_cache else model(**named)


def on_device(batch: Batch, model: nn.Module) -> Batch:
    """The batch where the model is, its floats in the dtype that the model computes in."""
    device = next(model.parameters()).device
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), None)
    return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in batch.items()}


def hidden_states(output: Any) -> Any:
    """A layer's hidden states, which some models wrap in a tuple."""
    return output[0] if isinstance(output, tuple) else output


def _run_model(
    model: nn.Module, stack: Stack, batch: Batch, hooks: Hooks, *, through: bool
) -> tuple[list[LayerCall], Any]:
    """Layer calls of one batch: all layers' with `through`, else the first's; with `through` the last layer's output too.

    Hidden states are kept of the first layer alone.
    """
    calls: list[LayerCall] = []
    outputs: list[Any] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = LayerCall.of(args, kwargs)
        calls.append(replace(call, hidden=_NOTHING) if calls else call)
        if not through:
            raise _StopForwardError

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        outputs.append(output)

    with hooks:
        for layer in stack.modules if through else stack.modules[:1]:
            hooks.before(layer, before)
        hooks.after(stack.modules[-1], after)
        try:
            feed(model, on_device(batch, model))
        except _StopForwardError:
            return calls, None
    return calls, outputs[-1]


def _same_arguments(left: LayerCall, right: LayerCall) -> bool:
    return left.by_name == right.by_name and _same(left.args, right.args) and _same(left.kwargs, right.kwargs)


def _same(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.shape == right.shape and bool(torch.equal(left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, (tuple, list)) and isinstance(right, (tuple, list)):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    return type(left) is type(right) and not isinstance(left, Tensor) and bool(left == right)


def _check_replay(model: nn.Module, stack: Stack, probe: list[LayerCall], output: Tensor | None) -> None:
    """Layer by layer from the first inputs must end where the model's own pass ended."""
    hidden = probe[0].hidden
    if len(probe) == len(stack.modules):
        for call, layer in zip(probe, stack.modules, strict=True):
            hidden = replace(call, hidden=hidden).run(layer)
    assert output is not None
    if not bool(output.isfinite().all()):
        raise NumericalError(
            f"{type(model).__name__}: the output of its last decoder layer is not finite before anything was changed: check "
            "the model's weights, or set a wider model.compute_dtype"
        )
    error = float((hidden - output).float().norm() / output.float().norm())
    if len(probe) != len(stack.modules) or not error <= _REPLAY_TOLERANCE:
        raise PlanError(
            f"{type(model).__name__}: running its {len(stack.modules)} decoder layers one by one does not reproduce the model "
            f"({len(probe)} calls, relative difference {error:.3g}): its layers share state, which is not supported"
        )
