"""H of a module's inputs in parts, so that a regularisation can be chosen on tokens that took no part in it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from armor_recipes.calibration.state import Identity, StatisticState, check_same
from armor_recipes.calibration.statistics import CrossGram, InputGram

#: One window of so many is kept apart, or so many groups of datasets are.
_HELD_OUT_EVERY = 4
#: Parts where windows are told apart by their number; those of datasets are numbered from 0.
_THE_OTHERS, _EVERY_FOURTH = -2, -1

#: Chooses a number on pairs of H `(I, I)`: of some windows, and of those held out for them.
Choice = Callable[[Iterable[tuple[Tensor, Tensor]]], float]


@dataclass(frozen=True, slots=True)
class GramMoments:
    """What a `SplitGram` has found, once nothing more comes: float32 matrices that nobody writes to.

    Attributes:
        gram: H `(I, I)` of all tokens, exactly symmetric.
        tokens: how many those were.
        choice: what was chosen on the splits; None where nothing was to be chosen, or there is nothing to hold out.
        cross: C = XX̂ᵀ/n `(I, I)`, of pairs.
        dense: XXᵀ/n `(I, I)` of the dense model's inputs, of pairs.
    """

    gram: Tensor
    tokens: int
    choice: float | None
    cross: Tensor | None
    dense: Tensor | None


class SplitGram:
    """H of a module's inputs in parts, to choose a regularisation on tokens that took no part in it.

    Windows of several datasets are parted by those (in four groups at most), since text of another kind is what a model meets; else
    every fourth window is kept apart. Fed with pairs (`propagate: matched`) it also keeps what the dense model's module reads on
    the same tokens: C = XX̂ᵀ/n, and XXᵀ/n. `choose` is asked once, whoever reads.
    """

    def __init__(self, name: str, d_in: int, choose: Choice | None = None) -> None:
        self.name = name
        self.d_in = d_in
        self._choose = choose
        self._origins: tuple[int, ...] = ()
        self._first = self._windows = 0
        self._parts: dict[int, InputGram] = {}
        self._pairs, self._dense = CrossGram(name, d_in), InputGram(name, d_in)
        self._lock = threading.Lock()
        self._found: GramMoments | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    def expect(self, origins: Sequence[int], first: int = 0) -> None:
        """The number of its dataset for each window of the calibration, in order; they come again from the first after the last.

        `first` is the number of the first window to come: the others go to another statistic, which is merged with this one.
        """
        self._origins = tuple(origins) if len(set(origins)) > 1 else ()
        self._first = first

    @property
    def tokens(self) -> int:
        """Input rows seen so far."""
        return sum(part.tokens for part in self._parts.values()) if self._found is None else self._found.tokens

    @property
    def full_bytes(self) -> int:
        """Memory of its sums once it has seen windows of both parts; several datasets are up to four."""
        return 2 * self._empty().full_bytes

    @property
    def enough_tokens(self) -> int:
        """As of an `InputGram`."""
        return self._empty().enough_tokens

    def update(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Take inputs `(B, L, I)`, a window an entry of B, or rows `(..., I)` as one window; and the dense model's beside them."""
        self._check_open()
        for window in x if x.ndim == 3 else x[None]:
            part = self._part_of_next(whole_window=x.ndim == 3)
            self._parts.setdefault(part, self._empty()).update(window)
            self._windows += 1
        if dense is not None:
            self._pairs.update_pair(x, dense)
            self._dense.update(dense)

    @property
    def identity(self) -> Identity:
        """Class, module and width."""
        return type(self).__name__, self.name, self.d_in

    def merge(self, other: SplitGram) -> None:
        """Take all that another one has seen of the same module: windows that come after those of this one.

        Part by part, as `InputGram.merge` does, with its promise. Raises ValueError where the other one is of another module or
        width, or expects other windows.
        """
        self._check_open()
        other._check_open()
        check_same(self.identity, other.identity)
        if self._origins != other._origins:
            raise ValueError(f"the statistics of {self.name} expect windows of other datasets: they cannot be merged")
        for key, part in sorted(other._parts.items()):
            self._parts.setdefault(key, self._empty()).merge(part)
        self._pairs.merge(other._pairs)
        self._dense.merge(other._dense)
        self._windows += other._windows

    def state(self) -> StatisticState:
        """All that was seen, bit for bit, with the place in the windows that are expected."""
        self._check_open()
        counts = {"d_in": self.d_in, "first": self._first, "windows": self._windows}
        lists = {"origins": self._origins, "parts": tuple(sorted(self._parts))}
        parts = {f"part {key}": part.state() for key, part in sorted(self._parts.items())}
        beside = {"pairs": self._pairs.state(), "dense": self._dense.state()}
        return StatisticState.of_parts(type(self).__name__, self.name, {**counts, **lists}, {**parts, **beside})

    def load_state(self, state: StatisticState) -> None:
        """Go on from what `state` gave, as `InputGram.load_state` does; the windows that are expected come with it.

        Raises ValueError as that does, or where this one was told to expect other windows.
        """
        check_same(self.identity, (state.kind, state.module, state.number("d_in")))
        origins, keys = (_numbers(state, name) for name in ("origins", "parts"))
        if self._origins not in ((), origins):
            raise ValueError(
                f"the state of {self.name} is of windows of other datasets: load that of the same calibration"
            )
        if self._windows:
            raise ValueError(f"the statistic of {self.name} has seen {self.tokens} tokens: load into a new one")
        parts = {key: self._empty() for key in keys}
        for name, part in {**{f"part {key}": part for key, part in parts.items()}, "dense": self._dense}.items():
            part.load_state(state.part(name, InputGram.__name__))
        self._pairs.load_state(state.part("pairs", CrossGram.__name__))
        self._parts, self._origins = parts, origins
        self._first, self._windows = state.number("first"), state.number("windows")

    def finish(self) -> GramMoments:
        """What was found; from then on nothing can be added, and the float64 sums are given back.

        Threads may call it at once: the first computes, all get the same. Raises NumericalError as `InputGram.value` does.
        """
        with self._lock:
            if self._found is None:
                self._found = self._moments()
                self._parts, self._pairs, self._dense = {}, CrossGram(self.name, self.d_in), self._empty()
            return self._found

    def _moments(self) -> GramMoments:
        total, paired = self._all(), self._pairs.tokens > 0
        return GramMoments(
            gram=total.value,
            tokens=total.tokens,
            choice=self._choose(self._splits(total)) if self._choose is not None and len(self._parts) > 1 else None,
            cross=self._pairs.value if paired else None,
            dense=self._dense.value if paired else None,
        )

    def splits(self) -> Iterator[tuple[Tensor, Tensor]]:
        """H of some windows and H of those held out for them, `(I, I)` each: every dataset in turn, or every fourth window once.

        Empty where there is nothing to hold out.
        """
        self._check_open()
        if len(self._parts) > 1:
            yield from self._splits(self._all())

    def _splits(self, total: InputGram) -> Iterator[tuple[Tensor, Tensor]]:
        for key, part in sorted(self._parts.items()):
            if key != _THE_OTHERS:
                yield total.without(part).value, part.value

    @property
    def value(self) -> Tensor:
        """H `(I, I)` of all tokens so far, float32, exactly symmetric. Raises NumericalError as `InputGram.value` does."""
        return self._all().value if self._found is None else self._found.gram

    def _part_of_next(self, *, whole_window: bool) -> int:
        place = self._first + self._windows
        if whole_window and self._origins:
            return self._origins[place % len(self._origins)] % _HELD_OUT_EVERY
        return _EVERY_FOURTH if place % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1 else _THE_OTHERS

    def _all(self) -> InputGram:
        total = self._empty()
        for _, part in sorted(self._parts.items()):
            total.merge(part)
        return total

    def _empty(self) -> InputGram:
        return InputGram(self.name, self.d_in)

    def _check_open(self) -> None:
        if self._found is not None:
            raise RuntimeError(f"the statistic of {self.name} is finished: its sums are gone")


def _numbers(state: StatisticState, name: str) -> tuple[int, ...]:
    """A list of numbers of a state. Raises ValueError where there is none of that name."""
    value = state.numbers.get(name)
    if isinstance(value, int) or value is None:
        raise ValueError(f"the state of a {state.kind} of {state.module} has no list {name!r}, only {[*state.numbers]}")
    return tuple(value)
