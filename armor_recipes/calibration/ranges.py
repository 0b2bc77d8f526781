"""The range of a module's inputs in each batch, from which observers of static activations choose."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor

from armor_recipes.calibration.state import Identity, StatisticState, check_same
from armor_recipes.errors import NumericalError


class InputRange:
    """The range of each call's input, in order, float32 on the CPU: smallest and largest value of all, or what `choose` makes of
    it, `(2, ...)`.
    """

    def __init__(self, name: str, d_in: int, choose: Callable[[Tensor], Tensor] | None = None) -> None:
        self.name = name
        self.d_in = d_in
        self.choose = choose
        self._tokens = 0
        self._ranges: list[Tensor] = []

    @property
    def tokens(self) -> int:
        """Input rows seen so far."""
        return self._tokens

    @property
    def identity(self) -> Identity:
        """Class, module and width."""
        return type(self).__name__, self.name, self.d_in

    def update(self, x: Tensor) -> None:
        """Take inputs `(..., I)`; a call without rows is none."""
        if not x.numel():
            return
        self._tokens += x.numel() // self.d_in
        found = torch.stack(torch.aminmax(x.detach())) if self.choose is None else self.choose(x.detach())
        self._ranges.append(found.float().cpu())

    def merge(self, other: Self) -> None:
        """Take all that another one has seen, after all that this one has. Raises ValueError where it is of other inputs."""
        check_same(self.identity, other.identity)
        self._tokens += other._tokens
        self._ranges += other._ranges

    def state(self) -> StatisticState:
        """All that was seen, bit for bit."""
        tensors = {"ranges": torch.stack(self._ranges) if self._ranges else torch.zeros(0, 2)}
        return StatisticState(type(self).__name__, self.name, {"tokens": self._tokens, "width": self.d_in}, tensors)

    def load_state(self, state: StatisticState) -> None:
        """Go on from what `state` gave. Raises ValueError where the state is of another statistic."""
        check_same(self.identity, (state.kind, state.module, state.number("width")))
        self._tokens = state.number("tokens")
        self._ranges = list(state.tensors["ranges"])

    def extremes(self, *, moving: float | None = None, last: bool = False) -> tuple[Tensor, Tensor]:
        """Smallest and largest of all calls; with `moving`, each call's moves those before by that share; with `last`, of the
        last call.

        Raises NumericalError where nothing was seen, or what is no number.
        """
        if not self._ranges:
            raise NumericalError(f"no calibration token reaches {self.name}: the range of its inputs is unknown")
        ranges = torch.stack(self._ranges)
        if not bool(ranges.isfinite().all()):
            broken = int((~ranges.isfinite()).flatten(1).any(1).sum())
            raise NumericalError(
                f"the inputs of {self.name} are not finite in {broken} of {len(ranges)} calls during calibration; check "
                "the model's weights, or set a wider `compute_dtype`"
            )
        if last:
            return ranges[-1, 0], ranges[-1, 1]
        if moving is None:
            return ranges[:, 0].amin(0), ranges[:, 1].amax(0)
        found = ranges[0]
        for one in ranges[1:]:
            found = found.lerp(one, moving)
        return found[0], found[1]
