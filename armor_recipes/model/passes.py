"""Blocks that cannot be run one after the other: their inputs are found by passes of the whole model, block by block."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from armor_recipes.calibration.inputs import Batch, leading
from armor_recipes.compute import is_out_of_memory
from armor_recipes.errors import PlanError
from armor_recipes.model.blocks import Stack, Stacks
from armor_recipes.model.calls import CALL_ERRORS, REPLAY_TOLERANCE, LayerCall, hidden_states, relative_difference
from armor_recipes.model.hooks import Hooks
from armor_recipes.model.padding import NO_PADDING, Padding, has_masks, padding_of, reads_of
from armor_recipes.model.replay import COLLECTING_NOTHING, Collecting, StopForwardError, batches_of, feed_alike
from armor_recipes.model.views import dense_view, shared_names


class PassStream:
    """The activations of one calibration set at the blocks of a stack, each time by a pass of the whole model as it is now.

    Args:
        groups: the samples, those of one shape together.
        uses: for a block those that use its weights, too: a pass goes as far as the last of them.
        originals: weights, by parameter, that stand in the place of the model's own in a pass: the dense model's; None for none.

    Attributes:
        batches: what the model was called with.
        padding: of the batch that is passing, at the block that is running.
        passes: how many passes there were.
        hidden: nothing: each pass begins anew.
    """

    def __init__(
        self,
        model: nn.Module,
        stacks: Stacks,
        stack: Stack,
        groups: Sequence[Batch],
        *,
        batch_size: int,
        hooks: Hooks,
        uses: Callable[[int], Sequence[int]],
        originals: Callable[[], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._model, self._stacks, self._stack = model, stacks, stack
        self._hooks, self._uses, self._originals = hooks, uses, originals
        self._reads = reads_of(model, stack.names[0], groups[0])
        self.batches = tuple(batches_of(model, groups, batch_size))
        self.padding: Padding = NO_PADDING
        self.hidden: list[Tensor] = []
        self.passes = self._batch = 0
        self._counts = [self._count(batch) for batch in self.batches]

    def uses(self, block: int) -> Iterator[tuple[LayerCall, ...]]:
        """For each batch all calls of a block. Raises PlanError where the block by itself gives not what it gives in the model."""
        for index, (calls, outputs) in enumerate(self._watched(block)):
            if index == 0:
                self._check_alone(block, calls, outputs)
            yield calls

    def outputs(self, block: int) -> Iterator[tuple[Tensor, ...]]:
        """For each batch what each call of the block gives."""
        for _, outputs in self._watched(block):
            yield outputs

    def paddings(self, block: int) -> Iterator[Padding]:
        """For each batch its padding at the block."""
        if not any(map(has_masks, self.batches)):
            yield from [NO_PADDING] * len(self.batches)
            return
        for batch, (calls, _) in zip(self.batches, self._watched(block), strict=True):
            yield padding_of(batch, self._reads, calls[0]) if calls else NO_PADDING

    def observe(self, block: int, collecting: Collecting = COLLECTING_NOTHING) -> None:
        """A pass of every batch for the hooks' sake, as far as the last call of the block or of one that uses its weights."""
        wanted, first = (block, *self._uses(block)), 0
        with self._hooks:
            for index in wanted:
                self._hooks.before(self._stacks.block(index), self._pad)
            for batch, counts in enumerate(self._counts):
                collecting.begin(first)
                self._pass(batch, Counter({index: counts[index] for index in wanted}))
                collecting.add(collecting.seen())
                first += len(leading(self.batches[batch]))

    def advance(self, block: int, collecting: Collecting | None = None) -> None:
        """Nothing: the next pass begins anew."""

    def _watched(self, block: int) -> Iterator[tuple[tuple[LayerCall, ...], tuple[Tensor, ...]]]:
        """For each batch the calls of a block and what they give."""
        for batch, counts in enumerate(self._counts):
            calls: list[LayerCall] = []
            outputs: list[Tensor] = []
            with self._hooks:
                self._hooks.before(self._stacks.block(block), _keeping_calls(calls))
                self._hooks.after(self._stacks.block(block), _keeping_outputs(outputs))
                self._pass(batch, Counter({block: counts[block]}))
            yield tuple(calls), tuple(outputs)

    def _pad(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch = self.batches[self._batch]
        self.padding = padding_of(batch, self._reads, LayerCall.of(args, kwargs)) if has_masks(batch) else NO_PADDING

    def _count(self, batch: Batch) -> Counter[int]:
        """How often each block is called for a batch."""
        found: Counter[int] = Counter()
        with self._hooks:
            for stack in self._stacks.every:
                for index in stack.indices:
                    self._hooks.before(stack.block(index), lambda *_, index=index: found.update([index]))
            self.passes += 1
            feed_alike(self._model, batch)
        return found

    def _pass(self, batch: int, left: Counter[int]) -> None:
        """A pass with the hooks that are there, stopped once the blocks were called so many times; none where they never are."""

        def after(index: int) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                left[index] -= 1
                if left.total() == 0:
                    raise StopForwardError

            return hook

        if left.total() == 0:
            return
        self._batch = batch
        self.passes += 1
        with self._hooks:
            for index in left:
                self._hooks.after(self._stacks.block(index), after(index))
            network = self._network()
            with suppress(StopForwardError):
                feed_alike(network, self.batches[batch])

    def _network(self) -> nn.Module:
        """The model, or a view of it with the dense weights. Hooks that are there are the view's, too."""
        if self._originals is None:
            return self._model
        return dense_view(self._model, dict(shared_names(self._model, self._originals())))

    def _check_alone(self, block: int, calls: Sequence[LayerCall], outputs: Sequence[Tensor]) -> None:
        network = self._network()
        name = self._stack.block_name(block)
        module = network.get_submodule(name)
        try:
            found = [relative_difference(call.run(module), wanted) for call, wanted in zip(calls, outputs, strict=True)]
        except CALL_ERRORS as error:
            if is_out_of_memory(error):
                raise
            found = [float("inf")]
        if not max(found, default=0.0) <= REPLAY_TOLERANCE:
            raise PlanError(
                f"{name}: run by itself it does not give what it gives in the model (relative difference {max(found):.3g}): its "
                "layers share state. Statistics can be taken by passes of the whole model, but nothing that runs a layer by itself "
                "can be done (training layer by layer, `propagate: matched`, reordering channels)"
            )


def _keeping_calls(calls: list[LayerCall]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        call = LayerCall.of(args, kwargs)
        calls.append(replace(call, hidden=call.hidden.clone()))  # the model may go on in the same memory

    return keep


def _keeping_outputs(outputs: list[Tensor]) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
    return lambda _, __, output: outputs.append(hidden_states(output).clone())
