"""Arguments of a model's forward pass made of random numbers, by a description that the model's facts give."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from armor_recipes.calibration.inputs import Batch


@dataclass(frozen=True, slots=True)
class RandomInput:
    """One argument of a forward pass, for one sample.

    Attributes:
        name: the argument's.
        shape: of one sample.
        values: `ids`: int64, uniform over the numbers below `below` without `without`; `normal`: float32 with mean 0 and
            variance 1; `fixed`: `constant` alone.
        below: ids are smaller than it.
        without: ids that are not drawn, sorted.
        places: places of the last dimension and the ids that stand there in every sample.
        constant: the values of a `fixed` one, in order.
    """

    name: str
    shape: tuple[int, ...]
    values: Literal["ids", "normal", "fixed"]
    below: int = 0
    without: tuple[int, ...] = ()
    places: tuple[tuple[int, int], ...] = ()
    constant: tuple[int, ...] = ()

    def drawn(self, samples: int, generator: torch.Generator) -> Tensor:
        """So many samples `(samples, *shape)`."""
        shape = (samples, *self.shape)
        match self.values:
            case "normal":
                return torch.randn(shape, generator=generator)
            case "fixed":
                one = torch.tensor(self.constant, dtype=torch.int64).view(self.shape)
                return one.expand(shape).contiguous()
            case "ids":
                return self._ids(torch.randint(self.below - len(self.without), shape, generator=generator))

    def _ids(self, drawn: Tensor) -> Tensor:
        for left_out in self.without:
            drawn = drawn + (drawn >= left_out)
        for place, value in self.places:
            drawn[..., place] = value
        return drawn


def draw(inputs: tuple[RandomInput, ...], samples: int, generator: torch.Generator) -> Batch:
    """Named tensors of so many samples, drawn one after the other in the order given."""
    return {each.name: each.drawn(samples, generator) for each in inputs}
