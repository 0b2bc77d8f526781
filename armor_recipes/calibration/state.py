"""What a statistic has seen, as plain data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class StatisticState:
    """All that a statistic has seen: read again, in another run or process, it goes on as the one that gave it, bit for bit.

    `tensors` go into a safetensors file as they are, the other fields into JSON.

    Attributes:
        kind: the statistic's class.
        module: the module that is observed, the first of those that read the same input.
        numbers: counts by name, and lists of them.
        tensors: sums by name. They are the statistic's own, not copies: write them before its next `update`.
    """

    kind: str
    module: str
    numbers: Mapping[str, int | Sequence[int]]
    tensors: Mapping[str, Tensor]

    @classmethod
    def of_parts(
        cls,
        kind: str,
        module: str,
        numbers: Mapping[str, int | Sequence[int]],
        parts: Mapping[str, StatisticState],
    ) -> StatisticState:
        """One state of several, whose names are put before their numbers and tensors."""
        counts = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.numbers.items()}
        tensors = {f"{name}.{key}": value for name, part in parts.items() for key, value in part.tensors.items()}
        return cls(kind, module, {**numbers, **counts}, tensors)

    def part(self, name: str, kind: str) -> StatisticState:
        """One of the states that `of_parts` was given."""
        start = f"{name}."
        numbers = {key.removeprefix(start): value for key, value in self.numbers.items() if key.startswith(start)}
        tensors = {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}
        return StatisticState(kind, self.module, numbers, tensors)

    def number(self, name: str) -> int:
        """A count. Raises ValueError where there is none of that name."""
        value = self.numbers.get(name)
        if not isinstance(value, int):
            raise ValueError(
                f"the state of a {self.kind} of {self.module} has no number {name!r}, only {[*self.numbers]}"
            )
        return value


#: Class, module and width: what two statistics must have in common to become one.
Identity = tuple[str, str, int]


def check_same(own: Identity, other: Identity) -> None:
    """Raise ValueError unless two statistics are of one kind, module and width."""
    if own != other:
        kinds = " and ".join(f"{kind} of {module}, {width} channels wide" for kind, module, width in (own, other))
        raise ValueError(f"statistics of the same inputs are needed, these are: {kinds}")
