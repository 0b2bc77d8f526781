"""A moment and the range of a module's inputs, for methods that round weights by one and scale activations by the other."""

from __future__ import annotations

from typing import Generic, Self, TypeVar

from torch import Tensor

from armor_recipes.calibration.ranges import InputRange
from armor_recipes.calibration.state import StatisticState
from armor_recipes.calibration.statistics import InputGram, InputSecondMoment

M = TypeVar("M", bound=InputGram | InputSecondMoment)


class MomentAndRange(Generic[M]):
    """`moment` (mean squares, or the Gram matrix) and `range` of the same inputs."""

    def __init__(self, moment: M, range_: InputRange) -> None:
        self.name = moment.name
        self.moment: M = moment
        self.range = range_

    @property
    def tokens(self) -> int:
        """Input rows seen so far."""
        return self.moment.tokens

    @property
    def full_bytes(self) -> int:
        """Those of the moment."""
        return self.moment.full_bytes

    @property
    def enough_tokens(self) -> int:
        """As the moment asks for."""
        return self.moment.enough_tokens

    def update(self, x: Tensor) -> None:
        """Take inputs `(..., I)`."""
        self.moment.update(x)
        self.range.update(x)

    def merge(self, other: Self) -> None:
        """Take all that another one has seen, after all that this one has. Raises ValueError where it is of other inputs."""
        self.moment.merge(other.moment)  # type: ignore[arg-type]  # the same M
        self.range.merge(other.range)

    def state(self) -> StatisticState:
        """All that was seen, bit for bit."""
        parts = {"moment": self.moment.state(), "range": self.range.state()}
        return StatisticState.of_parts(type(self).__name__, self.name, {}, parts)

    def load_state(self, state: StatisticState) -> None:
        """Go on from what `state` gave. Raises ValueError where the state is of another statistic."""
        self.moment.load_state(state.part("moment", type(self.moment).__name__))
        self.range.load_state(state.part("range", "InputRange"))
