"""The journal of a run that several processes do: rank 0 keeps it, and what it finds there all go by."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from armor_recipes.compute.ranks import agree, first
from armor_recipes.model.replay import Activations
from armor_recipes.modifiers.kinds.changes import Changes
from armor_recipes.modifiers.kinds.contract import Snapshot
from armor_recipes.session.journal import Done, Journal, Mark


class SharedJournal(Journal):
    """`own` is the journal on rank 0, and on the others one that remembers nothing."""

    def __init__(self, own: Journal) -> None:
        self._own = own

    @property
    def mark(self) -> Mark | None:  # type: ignore[override]  # nobody sets it here
        """How far a run before has come."""
        return first(lambda: self._own.mark)

    def knows(self, keys: Sequence[str]) -> bool:
        """Whether the steps that come next are recorded, under these keys."""
        return first(lambda: self._own.knows(keys))

    def replay(self, key: str) -> Done | None:
        """The next step, if it is recorded."""
        return first(lambda: self._own.replay(key))

    def next_key(self, stage: str, stack: str | None, steps: int | None) -> str | None:
        """The key of the next step, if it is recorded."""
        return first(lambda: self._own.next_key(stage, stack, steps))

    def record(self, place: tuple[str, str], done: Done) -> None:
        """Add a step."""
        self._own.record(place, done)

    def mapped(self, changes: Changes) -> dict[int, Tensor]:
        """Of the tensors of the last step: id → the same numbers in the journal's file, on rank 0."""
        return self._own.mapped(changes)

    def reach(self, place: tuple[str, str], block: int | None, streams: Sequence[Activations]) -> None:
        """Note how far a stack is done."""
        self._own.reach(place, block, streams)

    def restore(self, mark: Mark, streams: Sequence[Activations]) -> None:
        """Put activations back as they were at a mark."""

        def restored() -> list[tuple[list[Tensor], int]]:
            self._own.restore(mark, streams)
            return [(stream.hidden, stream.passes) for stream in streams]

        for stream, (hidden, passes) in zip(streams, first(restored), strict=True):
            stream.hidden[:] = hidden
            stream.passes = passes

    def same(self, name: str, value: str) -> None:
        """Note a value. Raises RecipeError where that of a run before, or of another process, is another one."""
        agree({name: value})
        self._own.same(name, value)

    def snapshot(self, key: str) -> Snapshot | None:
        """Where the state of a training is kept and found."""
        own = self._own.snapshot(key)
        return _SharedSnapshot(own) if first(lambda: own is not None) else None


class _SharedSnapshot:
    def __init__(self, own: Snapshot | None) -> None:
        self._own = own

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that was saved last."""
        return first(lambda: self._own.load() if self._own else None)

    def due(self) -> bool:
        """Whether it is time to save: on rank 0, whose state is that of all."""
        return self._own is not None and self._own.due()

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Keep the state."""
        if self._own is not None:
            self._own.save(tensors, state)
