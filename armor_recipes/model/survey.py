"""One look at a model before anything long: in which order its blocks are called, and which modules are reached at all."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from armor_recipes.calibration.inputs import Batch
from armor_recipes.model.blocks import Stacks
from armor_recipes.model.hooks import Hooks, input_of
from armor_recipes.model.replay import feed_alike, forward_errors, on_device


@dataclass(frozen=True, slots=True)
class Survey:
    """What one pass of a few samples tells.

    Attributes:
        blocks: how often each block is called, by its number, in the order of the first calls.
        readers: for each of the named modules the first that reads the very same tensor, often itself, in the order in which they
            are first called, those that are never called last.
        called: the named modules that are called, or another that has the weight of one.
        logits: whether the model's output has any.
    """

    blocks: Mapping[int, int]
    readers: Mapping[str, str]
    called: frozenset[str]
    logits: bool

    def place(self, block: int) -> int:
        """A block's place in the order of the first calls; those that are never called stand behind all others."""
        order = {number: place for place, number in enumerate(self.blocks)}
        return order.get(block, len(order) + block)

    def and_also(self, other: Survey) -> Survey:
        """With what another sample reaches besides."""
        more = {block: count for block, count in other.blocks.items() if block not in self.blocks}
        return replace(self, blocks={**self.blocks, **more}, called=self.called | other.called)


def survey(
    model: nn.Module,
    stacks: Stacks,
    names: Sequence[str],
    sample: Batch,
    hooks: Hooks,
    sharing: Mapping[str, Sequence[str]],
) -> Survey:
    """One pass of a sample. Modules that are called several times read the same if they do each time; those that are never called
    stand for themselves. `sharing` names all modules that have a module's weight: their calls are its own.

    No input is kept longer than the model keeps it. Raises InputError where the model's own code fails.
    """
    blocks: dict[int, int] = {}
    seen: dict[str, list[int]] = {name: [] for name in names}
    called: dict[str, None] = {}
    numbers = _Numbers()

    def count(index: int) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(*_: Any) -> None:
            blocks[index] = blocks.get(index, 0) + 1

        return hook

    def keep(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            called[name] = None
            seen[name].append(numbers.of(input_of(args, kwargs)))

        return hook

    with hooks:
        for index, block in ((index, stack.block(index)) for stack in stacks.every for index in stack.indices):
            hooks.before(block, count(index))
        for name in names:
            for module in dict.fromkeys(map(model.get_submodule, sharing.get(name, (name,)))):
                hooks.before(module, keep(name))
        with forward_errors(model, sample):
            output = feed_alike(model, on_device(sample, model))
    first: dict[tuple[int, ...], str] = {}
    found = {name: first.setdefault(tuple(inputs), name) if inputs else name for name, inputs in seen.items()}
    readers = {name: found[name] for name in dict.fromkeys((*called, *names))}
    return Survey(blocks, readers, frozenset(called), isinstance(getattr(output, "logits", None), Tensor))


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
