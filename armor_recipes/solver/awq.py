"""AWQ's scales: powers of how large the activations are, each tried on what rounding the weights then costs (arXiv 2306.00978)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from armor_recipes.errors import NumericalError

#: What is added to a divisor, and the least scale before it is normalised, as in llm-compressor.
_TINY, _LEAST = 1e-6, 1e-4

DuoScaling = Literal["both"] | bool


@dataclass(frozen=True, slots=True)
class GridPoint:
    """One candidate: the power of the activations' size, and whether the weights' size has a part in it."""

    power: float
    duo: bool


@dataclass(frozen=True, slots=True, eq=False)
class Searched:
    """The best scales `(I,)`, float64, their place in the grid and loss, and the loss of the first candidate."""

    scales: Tensor
    best: GridPoint
    loss: float
    first_loss: float


def grid(points: int, duo: DuoScaling) -> tuple[GridPoint, ...]:
    """The candidates, in llm-compressor's order: powers evenly spread over [0, 1].

    With `duo` true the first is scales of 1, the others look at weights, too; with `both` half of them do. Raises ValueError where
    there are too few points for a grid (2, 3 with `duo` true, 4 with `both`).
    """
    steps = {True: points - 2, False: points - 1, "both": points // 2 - 1}[duo]
    if steps < 1:
        raise ValueError(f"a grid of {points} points has no end besides its start; take 20, or 4 at least")
    powers = [step / steps for step in range(steps + 1)]
    if duo == "both":
        return tuple(GridPoint(power, of_weights) for power in powers for of_weights in (False, True))
    found = tuple(GridPoint(power, bool(duo)) for power in powers)
    return (GridPoint(0.0, False), *found) if duo else found


def candidate(point: GridPoint, activations: Tensor, weights: Tensor | None) -> Tensor:
    """`s_j = a_j^p`, or with `duo` `a_j^p / w_j^(1−p)`, divided by `√(max s · min s)`; float64 `(I,)`. What is not finite is 1.

    Args:
        point: p, and whether weights have a part in it.
        activations: a `(I,)`, the mean of |x_j|.
        weights: w `(I,)`, the mean of what `weight_sizes` gives; None where no candidate looks at weights.
    """
    a = activations.double()
    scales = a.pow(point.power)
    if point.duo and weights is not None:
        scales = scales / (weights.double().pow(1 - point.power) + _LEAST)
    scales = scales.clamp(min=_LEAST)
    scales = scales / (scales.max() * scales.min()).sqrt()
    return torch.where(scales.isfinite(), scales, 1.0)


def weight_sizes(weight: Tensor, piece: tuple[int, int]) -> Tensor:
    """The sum over rows of `|W_ij| / (max of its piece + 1e-6)`, float64 `(I,)`; pieces of `piece` rows and columns have one scale.

    The weight `(O, I)` is cut into pieces from its first entry on; the last ones may be smaller.
    """
    rows, columns = piece
    d_out, d_in = weight.shape
    whole = pad(weight.abs(), (0, -d_in % columns, 0, -d_out % rows))
    pieces = whole.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    relative = pieces / (pieces.amax((1, 3), keepdim=True) + _TINY)
    found: Tensor = relative.flatten(0, 1).flatten(1)[:d_out, :d_in].sum(0, dtype=torch.float64)
    return found


def mean_weight_sizes(weights: Sequence[tuple[Tensor, tuple[int, int]]]) -> Tensor:
    """The mean of `weight_sizes` over the rows of several weights `(O, I)`, each with its pieces; float64 `(I,)`."""
    total = torch.stack([weight_sizes(weight, piece) for weight, piece in weights]).sum(0)
    return total / sum(len(weight) for weight, _ in weights)


def search(
    points: Sequence[GridPoint], scales: Callable[[GridPoint], Tensor], loss: Callable[[Tensor], float]
) -> Searched:
    """Try the candidates in order; of equal losses the first counts. Raises NumericalError where no loss is finite."""
    best: Searched | None = None
    first_loss = math.nan
    for number, (point, tried, found) in enumerate(_tried(points, scales, loss)):
        first_loss = found if number == 0 else first_loss
        if math.isfinite(found) and (best is None or found < best.loss):
            best = Searched(tried, point, found, first_loss)
    if best is None:
        raise NumericalError("no candidate of the grid gives a finite loss: check the model's weights and data")
    return best


def _tried(
    points: Sequence[GridPoint], scales: Callable[[GridPoint], Tensor], loss: Callable[[Tensor], float]
) -> Iterator[tuple[GridPoint, Tensor, float]]:
    for point in points:
        tried = scales(point)
        yield point, tried, loss(tried)
