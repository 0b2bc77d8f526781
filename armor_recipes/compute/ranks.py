"""The processes that do one run together, and all that they tell each other.

Each of them runs the same program on the same data, and what takes long is shared out: an item for each in turn, or modules by
cost. Whatever one has computed all have afterwards, in an order that depends neither on who did it nor on how many there are. A
process by itself is a group of one, for which nothing here does anything.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, distributed

from armor_recipes.errors import RecipeError, ResourceError

T = TypeVar("T")
R = TypeVar("R")
#: What torchrun tells each process that it starts.
_LAUNCHED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
#: How long one waits for the others, which may solve a large module: that a process has ended is noticed without it.
_PATIENCE = timedelta(days=7)
#: How long one waits until all have come: those to come may still read their recipe and plan.
_MEETING = timedelta(minutes=10)
#: Where in gloo's source an error of it was raised.
_PLACE = re.compile(r"^\[[^\]]*\] *")
#: Tensors lie at multiples of so many bytes in a message.
_ALIGNED = 64
#: Seconds between looks whether a message has come; a signal is heard in between.
_FIRST_LOOK, _LAST_LOOK = 1e-4, 1e-2


class Ranks(Protocol):
    """A group of processes. Rank 0 leads: it alone reads and writes files that stay, and tells the others what it found."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""

    @property
    def size(self) -> int:
        """How many there are."""

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, in order; all call it. Raises ResourceError where a process has ended."""


@dataclass(frozen=True, slots=True)
class Alone:
    """A process by itself."""

    rank: int = 0
    size: int = 1

    def gather(self, value: Any) -> list[Any]:
        """The value."""
        return [value]


@dataclass(frozen=True, slots=True)
class Group:
    """Processes that talk through gloo, not as torch's default group: libraries that find one share out their own work."""

    rank: int
    size: int
    gloo: Any

    def gather(self, value: Any) -> list[Any]:
        """The value of each rank, in order; one's own is the very same."""
        own = _packed(value)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        _wait(partial(self.gloo.allgather, sizes, torch.tensor([own.numel()])))
        found = []
        for rank, size in enumerate(map(int, sizes)):
            message = own if rank == self.rank else torch.empty(size, dtype=torch.uint8)
            _wait(partial(self.gloo.broadcast, message, rank))
            found.append(value if rank == self.rank else _unpacked(message))
        return found


_ALONE = Alone()
#: Of the thread that has joined a group; threads that it starts have a context of their own, and so are alone.
_ranks: ContextVar[Ranks] = ContextVar("ranks", default=_ALONE)


def ranks() -> Ranks:
    """The processes that do this thread's run."""
    return _ranks.get()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process shares nothing out."""
    token = _ranks.set(_ALONE)
    try:
        yield
    finally:
        _ranks.reset(token)


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the other processes, where torchrun has started some; none leaves before the others unless it fails.

    Raises ResourceError where they cannot reach each other, or one has ended.
    """
    if any(name not in os.environ for name in _LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
        yield _ALONE
        return
    try:
        store, rank, size = next(distributed.rendezvous("env://"))  # type: ignore[attr-defined]
        own = distributed.PrefixStore("armor-recipes", store)  # type: ignore[attr-defined]
        own.set(f"rank {rank}", "is here")
        own.wait([f"rank {other}" for other in range(size)], _MEETING)
        group = Group(rank, size, distributed.ProcessGroupGloo(own, rank, size, _PATIENCE))
    except (RuntimeError, ValueError) as error:
        place = ", ".join(f"{name}={os.environ[name]}" for name in _LAUNCHED)
        raise ResourceError(f"the processes of this run do not find each other ({error}): {place}") from error
    token = _ranks.set(group)
    try:
        yield group
        group.gather(None)
    finally:
        _ranks.reset(token)


def leads() -> bool:
    """Whether this process is rank 0."""
    return _ranks.get().rank == 0


def first(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, which alone calls it."""
    found: T = _ranks.get().gather(make() if leads() else None)[0]
    return found


def each(make: Callable[[], T]) -> list[T]:
    """What `make` gives on each rank, in order. What one of them raises all raise: the first in order."""
    here = _ranks.get()
    try:
        own: Any = make()
    except Exception as error:
        if here.size == 1:
            raise
        own = _Failed(error)
    found = here.gather(own)
    for one in found:
        if isinstance(one, _Failed):
            raise one.error
    return found


def agree(values: Mapping[str, str]) -> None:
    """Raise RecipeError, on all ranks, where they do not have the same values, by name."""
    found = _ranks.get().gather(dict(values))
    differs = [name for name in values if any(other.get(name) != found[0].get(name) for other in found)]
    if differs:
        lines = [f"  {name}: {', '.join(str(other.get(name)) for other in found)}" for name in differs]
        raise RecipeError("\n".join(["the processes of this run differ, from rank 0 on:", *lines]))


def share(items: Sequence[T]) -> Sequence[T]:
    """The items that this rank computes: one for each in turn."""
    here = _ranks.get()
    return items[here.rank :: here.size]


def in_turn(results: Iterator[R], count: int) -> Iterator[R]:
    """The results for all items in order, so many, given those for this rank's `share`."""
    size = _ranks.get().size
    for start in range(0, count, size):
        yield from each(lambda: next(results, None))[: count - start]  # type: ignore[misc]  # None beyond the last item alone


def by_cost(costs: Sequence[float]) -> list[list[int]]:
    """For each rank the places of the items that it computes, in order: the dearest first, each to whoever has least to do."""
    size = _ranks.get().size
    loads, found = [0.0] * size, [list[int]() for _ in range(size)]
    for place in sorted(range(len(costs)), key=lambda place: (-costs[place], place)):
        rank = loads.index(min(loads))
        loads[rank] += costs[place]
        found[rank].append(place)
    return [sorted(places) for places in found]


class _Failed:
    """An error on its way to the other ranks; one that cannot be told as it is goes as its text."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __reduce__(self) -> tuple[type[_Failed], tuple[Exception]]:
        try:
            pickle.loads(pickle.dumps(self.error))
        except Exception:
            return _Failed, (RuntimeError(f"{type(self.error).__name__}: {self.error}"),)
        return _Failed, (self.error,)


class _Pickler(pickle.Pickler):
    """Leaves tensors out of the pickle: of views it would take the whole storage."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.tensors: list[Tensor] = []
        self._places: dict[int, int] = {}

    def persistent_id(self, value: Any) -> int | None:
        """The tensor's place among those left out."""
        if type(value) is not Tensor or value.device.type != "cpu" or value.requires_grad:
            return None
        if id(value) not in self._places:
            self._places[id(value)] = len(self.tensors)
            self.tensors.append(value)
        return self._places[id(value)]


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, place: int) -> Tensor:
        """The tensor that was left out."""
        return self._tensors[place]


def _packed(value: Any) -> Tensor:
    """A message: the length of a header, the header (what tensors there are, and the pickle), and the tensors' bytes."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    rows, parts, at = [], [], 0
    for tensor in pickler.tensors:
        dense = tensor if _is_dense(tensor) else tensor.contiguous()
        flat = dense.as_strided((dense.numel(),), (1,)).view(torch.uint8)  # in the order in which it lies there
        rows.append((dense.dtype, tuple(dense.shape), dense.stride(), at))
        parts += [flat, torch.zeros(-flat.numel() % _ALIGNED, dtype=torch.uint8)]
        at += flat.numel() + -flat.numel() % _ALIGNED
    header = pickle.dumps((rows, file.getvalue()))
    length = torch.tensor([len(header)]).view(torch.uint8)
    return torch.cat([length, torch.frombuffer(bytearray(header), dtype=torch.uint8), *parts])


def _is_dense(tensor: Tensor) -> bool:
    """Whether its numbers lie without gaps, in whatever order of its dimensions."""
    expected = 1
    for stride, size in sorted(pair for pair in zip(tensor.stride(), tensor.shape, strict=True) if pair[1] != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _unpacked(message: Tensor) -> Any:
    """The value of a message that another process of this run has packed, its tensors in memory of their own."""
    length = int(message[:8].clone().view(torch.int64))
    rows, pickled = pickle.loads(bytes(message[8 : 8 + length].numpy()))
    tensors = []
    for dtype, shape, stride, at in rows:
        tensor = torch.empty_strided(shape, stride, dtype=dtype)
        flat = tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)
        flat.copy_(message[8 + length + at :][: flat.numel()])
        tensors.append(tensor)
    return _Unpickler(io.BytesIO(pickled), tensors).load()


def _wait(begin: Callable[[], Any]) -> None:
    try:
        work, pause = begin(), _FIRST_LOOK
        while not work.is_completed():
            time.sleep(pause)
            pause = min(2 * pause, _LAST_LOOK)
        work.wait()
    except RuntimeError as error:
        reason = _PLACE.sub("", str(error)).partition(". This")[0]
        raise ResourceError(f"another process of this run has ended, and it cannot go on without ({reason})") from error
