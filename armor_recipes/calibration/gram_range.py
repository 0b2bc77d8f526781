"""The Gram matrix and the range of a module's inputs, for methods that round weights by one and scale activations by the other."""

from __future__ import annotations

from typing import Self

from torch import Tensor

from armor_recipes.calibration.ranges import InputRange
from armor_recipes.calibration.state import StatisticState
from armor_recipes.calibration.statistics import InputGram


class InputGramAndRange:
    """`gram` and `range` of the same inputs."""

    def __init__(self, name: str, d_in: int) -> None:
        self.name = name
        self.gram, self.range = InputGram(name, d_in), InputRange(name, d_in)

    @property
    def tokens(self) -> int:
        """Input rows seen so far."""
        return self.gram.tokens

    @property
    def full_bytes(self) -> int:
        """Those of the Gram matrix."""
        return self.gram.full_bytes

    @property
    def enough_tokens(self) -> int:
        """As the Gram matrix asks for."""
        return self.gram.enough_tokens

    def update(self, x: Tensor) -> None:
        """Take inputs `(..., I)`."""
        self.gram.update(x)
        self.range.update(x)

    def merge(self, other: Self) -> None:
        """Take all that another one has seen, after all that this one has. Raises ValueError where it is of other inputs."""
        self.gram.merge(other.gram)
        self.range.merge(other.range)

    def state(self) -> StatisticState:
        """All that was seen, bit for bit."""
        parts = {"gram": self.gram.state(), "range": self.range.state()}
        return StatisticState.of_parts(type(self).__name__, self.name, {}, parts)

    def load_state(self, state: StatisticState) -> None:
        """Go on from what `state` gave. Raises ValueError where the state is of another statistic."""
        self.gram.load_state(state.part("gram", "InputGram"))
        self.range.load_state(state.part("range", "InputRange"))
