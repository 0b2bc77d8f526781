"""Activations at the door of a stack, and its blocks run one by one on them."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from armor_recipes.calibration.inputs import TOKENS, Batch, arguments, batched, some_of
from armor_recipes.compute import drawn_alike, is_out_of_memory
from armor_recipes.compute.threads import in_order
from armor_recipes.errors import InputError, NumericalError, PlanError
from armor_recipes.model.blocks import Stack
from armor_recipes.model.calls import CALL_ERRORS, REPLAY_TOLERANCE, LayerCall, hidden_states, relative_difference
from armor_recipes.model.facts import model_facts
from armor_recipes.model.finite import ADVICE, first_broken, is_finite, joined
from armor_recipes.model.hooks import Hooks, input_of
from armor_recipes.model.padding import NO_PADDING, Padding, padding_of, reads_of

__all__ = ["Activations", "LayerCall", "Stream", "capture_stream", "feed", "feed_alike", "hidden_states", "on_device"]

R = TypeVar("R")
Keep = Callable[[Tensor], Tensor]
#: In the place of hidden states that are not kept.
_NOTHING = torch.empty(0)
#: In the place of one that has none.
_NO_CALL = LayerCall(_NOTHING, (), {})
#: By how much the first block's output is changed, to see whether what later blocks are called with depends on it.
_NUDGE = 1.0625


class StopForwardError(Exception):
    """Raised by a hook once what is asked for is in hand; never leaves this room."""


def as_it_is(hidden: Tensor) -> Tensor:
    """What is kept in memory."""
    return hidden


class Collecting(Protocol):
    """What hooks see while batches pass a block, several of them at once, each in a thread."""

    def begin(self, first: int) -> None:
        """In the thread in which a batch is about to pass: the number of its first window."""

    def seen(self) -> Any:
        """In the same thread, once the batch has passed: what was seen of it."""

    def add(self, seen: Any) -> None:
        """Take what was seen of the next batch, in their order."""


class CollectingNothing:
    """For passes without hooks."""

    def begin(self, first: int) -> None:
        """Nothing."""

    def seen(self) -> None:
        """Nothing."""

    def add(self, seen: Any) -> None:
        """Nothing."""


COLLECTING_NOTHING = CollectingNothing()


class Activations(Protocol):
    """What one calibration set brings to the blocks of a stack, in one model."""

    batches: tuple[Batch, ...]
    hidden: list[Tensor]
    passes: int

    @property
    def padding(self) -> Padding:
        """Of the batch that is passing in this thread."""

    def uses(self, block: int) -> Iterator[tuple[LayerCall, ...]]:
        """For each batch the calls of a block: one, unless the model calls it several times."""

    def outputs(self, block: int) -> Iterator[tuple[Tensor, ...]]:
        """For each batch what each call of a block gave, once `advance` has passed it."""

    def paddings(self, block: int) -> Iterator[Padding]:
        """For each batch its padding at a block."""

    def observe(self, block: int, collecting: Collecting = COLLECTING_NOTHING) -> None:
        """Run a block on every batch for its hooks' sake."""

    def advance(self, block: int, collecting: Collecting = COLLECTING_NOTHING) -> None:
        """Go on to the next block."""


class Stream:
    """The activations of one calibration set: what every batch brings to the next block, with the arguments that go along.

    Most models pass every block the same arguments; then only the first block's are kept. Where they differ (sliding and
    full attention in turn, say), each block's own are.

    Attributes:
        batches: what the model was called with.
        hidden: activations of each batch at the door of the next block, `(B, L, H)`.
        passes: of the whole model, of which there are none.
    """

    passes = 0

    def __init__(
        self,
        calls: list[list[LayerCall]],
        stack: Stack,
        batches: Sequence[Batch],
        paddings: Sequence[Padding] | None = None,
        keep: Keep | None = None,
    ) -> None:
        self._calls = [[replace(call, hidden=_NOTHING) for call in batch] for batch in calls]
        self._stack = stack
        self._paddings = paddings or [NO_PADDING] * len(calls)
        self._here = threading.local()
        self.batches = tuple(batches)
        self._keep = keep or as_it_is
        self.hidden = [batch[0].hidden for batch in calls]

    def call(self, block: int, batch: int) -> LayerCall:
        """What a block is called with for a batch; `hidden` must have come as far as that block."""
        calls = self._calls[batch]
        return replace(calls[min(block - self._stack.first, len(calls) - 1)], hidden=self.hidden[batch])

    def uses(self, block: int) -> Iterator[tuple[LayerCall, ...]]:
        """`call` for each batch in turn, by itself."""
        for batch in range(len(self.hidden)):
            yield (self.call(block, batch),)

    def outputs(self, block: int) -> Iterator[tuple[Tensor, ...]]:  # noqa: ARG002 - the stream is behind that block
        """The activations, for each batch by themselves."""
        for hidden in self.hidden:
            yield (hidden,)

    def paddings(self, block: int) -> Iterator[Padding]:  # noqa: ARG002 - the same at all blocks
        """Of each batch."""
        yield from self._paddings

    @property
    def padding(self) -> Padding:
        """Of the batch that is passing in this thread."""
        found: Padding = getattr(self._here, "padding", NO_PADDING)
        return found

    def observe(self, block: int, collecting: Collecting = COLLECTING_NOTHING) -> None:
        """Run a block on every batch for its hooks' sake."""
        for _ in self._run(block, collecting, lambda _: None):
            pass

    def advance(self, block: int, collecting: Collecting = COLLECTING_NOTHING) -> None:
        """Replace the activations by a block's outputs. Raises NumericalError where those of a token are not finite."""
        for index, output in enumerate(self._run(block, collecting, lambda output: output)):
            if not all(map(is_finite, self._paddings[index].pieces(output))):
                raise self._broken(block, index)
            self.hidden[index] = self._keep(output)

    def _run(self, block: int, collecting: Collecting, of: Callable[[Tensor], R]) -> Iterator[R]:
        """Run a block on every batch, several at once on a CPU; yields what is asked of its outputs, in order."""
        firsts = [0, *accumulate(len(hidden) for hidden in self.hidden)]

        def passed(batch: int) -> tuple[R, Any]:
            self._here.padding = self._paddings[batch]
            collecting.begin(firsts[batch])
            output = self.call(block, batch).run(self._stack.block(block))
            return of(output), collecting.seen()

        on_cpu = self.hidden[0].device.type == "cpu"
        for output, seen in in_order(passed, range(len(self.hidden)), on_cpu=on_cpu):
            collecting.add(seen)
            yield output

    def _broken(self, block: int, batch: int) -> NumericalError:
        module = self._stack.block(block)
        inner = first_broken(module, lambda: self.call(block, batch).run(module))
        return NumericalError(
            f"the output of {joined(self._stack.block_name(block), inner)} is not finite in batch {batch} (from 0) of the "
            f"calibration; {ADVICE}"
        )


@dataclass(frozen=True, slots=True)
class StackProbe:
    """What one sample's pass through the whole model tells of a stack.

    Attributes:
        same: whether all blocks are called with the same arguments.
        problem: why the blocks cannot be run one by one, as the end of a sentence; empty where they can.
    """

    same: bool
    problem: str = ""


def probe_stack(model: nn.Module, stack: Stack, inputs: Batch, hooks: Hooks) -> StackProbe:
    """Send the first sample through the whole model, and through the blocks one by one.

    Raises InputError where the model's own code fails, NumericalError where what the last block gives is not finite.
    """
    sample = some_of(inputs, slice(1))
    with forward_errors(model, sample):
        seen = _watch(model, stack, sample, hooks)
    output = seen.outputs[-1] if seen.outputs else None
    if isinstance(output, Tensor) and not is_finite(output):
        inner = first_broken(model, lambda: feed_alike(model, on_device(sample, model)))
        raise NumericalError(
            f"{type(model).__name__}: the output of {inner or stack.names[-1]} is not finite before anything was changed: "
            f"{ADVICE}"
        )
    places = [place for place, _ in seen.calls]
    if places != list(range(len(stack.modules))) or not isinstance(output, Tensor):
        return StackProbe(same=False, problem=f"{len(places)} calls of {len(stack.modules)} blocks")
    calls = [call for _, call in seen.calls]
    difference = _replay_difference(stack, calls, output)
    if not difference <= REPLAY_TOLERANCE:
        return StackProbe(same=False, problem=f"{len(calls)} calls, relative difference {difference:.3g}")
    same = all(calls[0].same_arguments(call) for call in calls[1:])
    if not same and _carry(calls, _watch(model, stack, sample, hooks, blocks=len(calls), nudge=True).calls):
        return StackProbe(
            same=False, problem="a block is called with what an earlier one gave besides its hidden states"
        )
    return StackProbe(same)


def open_stream(
    model: nn.Module,
    stack: Stack,
    groups: Sequence[Batch],
    *,
    batch_size: int,
    hooks: Hooks,
    same: bool = True,
    keep: Keep = as_it_is,
) -> Stream:
    """Take the first block's inputs for every batch, and the other blocks' arguments unless all have the `same`.

    Samples of a group are of one shape. The model's forward pass is stopped at the door of the last block asked: neither that block
    nor the head behind it is computed. Where arguments differ from block to block, but the first two batches show that they do not
    depend on what the tokens are, only the first block is asked from there on. `keep` says where activations go.
    """
    batches = batches_of(model, groups, batch_size)
    calls: list[list[LayerCall]] = []
    usual: list[LayerCall] = []
    for batch in batches:
        known = bool(usual) and _alike(batch, batches[0])
        seen = _calls(model, stack, batch, hooks, blocks=1 if same or known else None)
        if known and not seen[0].same_arguments(usual[0]):
            seen, known = _calls(model, stack, batch, hooks), False
        first = replace(seen[0], hidden=keep(seen[0].hidden))
        calls.append([first, *(usual[1:] if known else seen[1:])])
        if len(calls) == 2 and not same and _depends_on_shape_alone(batches, calls):
            usual = calls[0]
    reads = reads_of(model, stack.names[0], groups[0])
    paddings = [padding_of(batch, reads, first[0]) for batch, first in zip(batches, calls, strict=True)]
    return Stream(calls, stack, batches, paddings, keep)


def _calls(model: nn.Module, stack: Stack, batch: Batch, hooks: Hooks, *, blocks: int | None = None) -> list[LayerCall]:
    """The calls of the first so many blocks, or of all; hidden states of the first alone."""
    return [call for _, call in _watch(model, stack, batch, hooks, blocks=blocks or len(stack.modules)).calls]


def _alike(batch: Batch, other: Batch) -> bool:
    """Whether two batches are tokens alone, without a mask, in one shape."""
    return batch.keys() == other.keys() == {TOKENS} and batch[TOKENS].shape == other[TOKENS].shape


def _depends_on_shape_alone(batches: Sequence[Batch], calls: Sequence[Sequence[LayerCall]]) -> bool:
    """Whether all blocks are called with the same arguments for the first two batches, which are of other tokens in one shape."""
    one, other = batches[:2]
    if not _alike(one, other) or torch.equal(one[TOKENS], other[TOKENS]):
        return False
    return all(a.is_plain and a.same_arguments(b) for a, b in zip(*calls, strict=True))


def capture_stream(model: nn.Module, stack: Stack, inputs: Batch, *, batch_size: int, hooks: Hooks) -> Stream:
    """`open_stream` of a stack whose blocks can be run one by one. Raises PlanError where they cannot, and as `probe_stack`."""
    probe = probe_stack(model, stack, inputs, hooks)
    if probe.problem:
        raise PlanError(
            f"{type(model).__name__}: running its {len(stack.modules)} blocks {stack.name} one by one does not reproduce the model "
            f"({probe.problem}): its layers share state, which is not supported"
        )
    return open_stream(model, stack, [inputs], batch_size=batch_size, hooks=hooks, same=probe.same)


def batches_of(model: nn.Module, groups: Sequence[Batch], size: int) -> list[Batch]:
    """The samples in order, at most `size` of a group at a time, where the model is."""
    return [on_device(batch, model) for batch in batched(groups, size)]


class forward_errors:  # noqa: N801 - reads as a statement
    """Inside, what a model's own code raises becomes an InputError that tells what it was called with."""

    def __init__(self, model: nn.Module, sample: Batch) -> None:
        self._model, self._sample = model, sample

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not isinstance(error, CALL_ERRORS) or is_out_of_memory(error):
            return
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{type(self._model).__name__}: its forward pass fails on {_shapes(self._sample)} "
            f"({type(error).__name__}: {reason}): its config.json does not describe a model that runs, or these "
            "are not the inputs that it reads"
        ) from error


def _shapes(sample: Batch) -> str:
    if sample.keys() == {TOKENS}:
        return f"a window of {sample[TOKENS].shape[1]} tokens"
    return ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sample.items())


def inputs_of(
    modules: Sequence[nn.Module], call: LayerCall, block: nn.Module, hooks: Hooks, *, once: bool
) -> list[Tensor]:
    """What modules inside a block (or the block) read while the block runs `call`, a tensor for each time that one is called.

    With `once` the block is stopped there.
    """
    seen: list[Tensor] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(input_of(args, kwargs))
        if once:
            raise StopForwardError

    with hooks:
        for module in modules:
            hooks.before(module, keep)
        with suppress(StopForwardError):
            call.run(block)
    return seen


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """What a model's forward pass takes, by name."""
    return inspect.signature(type(model).forward).parameters


def feed(model: nn.Module, batch: Batch, **options: Any) -> Any:
    """The model's output for a batch on its device, without a cache of keys and values; `options` are further arguments."""
    parameters = parameters_of(model)
    passed_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    takes_cache = "use_cache" in parameters or (passed_on and model_facts(model).caches)
    named = {**arguments(batch), **options}
    return model(**named, use_cache=False) if takes_cache else model(**named)


def feed_alike(model: nn.Module, batch: Batch) -> Any:
    """`feed`, in which a model that draws random numbers draws the same ones each time. Not for several threads at once."""
    with drawn_alike(next(model.parameters()).device):
        return feed(model, batch)


def on_device(batch: Batch, model: nn.Module) -> Batch:
    """The batch where the model is, its floats in the dtype that the model computes in."""
    device = next(model.parameters()).device
    dtype = next((each.dtype for each in model.parameters() if each.is_floating_point()), None)
    return {name: x.to(device, dtype if x.is_floating_point() else None) for name, x in batch.items()}


@dataclass(frozen=True, slots=True)
class _Seen:
    """Calls of a stack's blocks in one pass, with each block's place, hidden states of the first alone; and the last output."""

    calls: list[tuple[int, LayerCall]]
    outputs: list[Any]


def _watch(
    model: nn.Module, stack: Stack, batch: Batch, hooks: Hooks, *, blocks: int | None = None, nudge: bool = False
) -> _Seen:
    """One pass of a batch: stopped at the door of the block after so many of them, or through the whole model.

    With `nudge` the first block's output is changed on the way.
    """
    seen = _Seen([], [])

    def before(place: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                call = LayerCall.of(args, kwargs)
            except TypeError:
                seen.calls.append((-1, _NO_CALL))
                return
            seen.calls.append((place, replace(call, hidden=_NOTHING) if seen.calls else call))
            if len(seen.calls) == blocks:
                raise StopForwardError

        return hook

    def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        hidden = hidden_states(output)
        # Models may go on in the same memory.
        seen.outputs[:] = [hidden.clone() if isinstance(hidden, Tensor) and blocks is None else hidden]

    with hooks:
        for place, block in enumerate(stack.modules[:blocks]):
            hooks.before(block, before(place))
        if nudge:
            hooks.changing(stack.modules[0], _nudged)
        hooks.after(stack.modules[-1], after)
        with suppress(StopForwardError):
            feed_alike(model, on_device(batch, model))
    return seen


def _nudged(output: Any) -> Any:
    """A block's output with other hidden states."""
    if isinstance(output, Tensor):
        return output * _NUDGE
    if type(output) in (tuple, list):
        return type(output)([output[0] * _NUDGE, *output[1:]])
    return output


def _carry(calls: Sequence[LayerCall], nudged: Sequence[tuple[int, LayerCall]]) -> bool:
    """Whether tensors that blocks are called with are other ones where the first block gives other hidden states.

    A container that all blocks are given is left out: what a block leaves there goes on to the next one in a replay, too.
    """
    if len(calls) != len(nudged):
        return True
    live = {
        name
        for name, value in calls[0].kwargs.items()
        if isinstance(value, (MutableMapping, list)) and _by_all(calls, name, value)
    }
    pairs = zip(calls, (call for _, call in nudged), strict=True)
    return not all(call.without(live).same_tensors(other.without(live)) for call, other in pairs)


def _by_all(calls: Sequence[LayerCall], name: str, value: Any) -> bool:
    return all(call.kwargs.get(name) is value for call in calls)


def _replay_difference(stack: Stack, calls: Sequence[LayerCall], output: Tensor) -> float:
    """How far running block by block from the first inputs ends from where the model's own pass ended; infinite where it fails.

    The larger of two runs: a block that keeps what it saw gives something else the second time.
    """
    try:
        return max(relative_difference(_replayed(stack, calls), output) for _ in range(2))
    except CALL_ERRORS as error:
        if is_out_of_memory(error):
            raise
        return float("inf")


def _replayed(stack: Stack, calls: Sequence[LayerCall]) -> Tensor:
    hidden = calls[0].hidden
    for call, block in zip(calls, stack.modules, strict=True):
        hidden = replace(call, hidden=hidden).run(block)
    return hidden
