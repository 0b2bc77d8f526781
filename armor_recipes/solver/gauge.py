"""The core's gauge: `A · S · B = A · (S D) · (D⁻¹ B)` for every positive diagonal D `(I,)`, and masks stay (see `docs/solver.md`).

Nothing beyond a diagonal is free, but for orders of columns that keep the groups of M whole: any other matrix between S and B would
fill what the masks of some rows leave empty. Scales of rows need no search: A absorbs them, and a row's scale of its integers does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from armor_recipes.solver.result import SparseFactors

#: Exponents of the mean square root of an entry of Bx, and of that of the kept values of its column of S.
_INPUT_POWERS, _VALUE_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0), (0.0, 0.25, 0.5)
#: Both measures are held within this share of their mean square roots below, so that an empty column has a finite scale.
_FLOOR = 1e-4
#: 8 bits hold the largest entry of Bx in 127 steps, and rounding to one has variance 1/12 of its square.
_STEPS = 12 * 127**2
#: Steps of the integral over the largest entry's size.
_POINTS = 64

#: `(values (O, N), weights (O, N)) -> Σ weight · (value − rounded)²`.
RoundingError = Callable[[Tensor, Tensor], float]


def choose_gauge(
    factors: SparseFactors, squares: Tensor, error: RoundingError, *, integer_activations: bool = False
) -> Tensor:
    """D `(I,)` float32 for which S·D is rounded with the least error, among products of powers of two measures of a column.

    The measures are the root mean square of an entry of Bx (power 0 to 1) and of the column's kept values (power 0 to −½), 15
    candidates in all. The first is D = 1, which stays where nothing is better: the result is never worse by this measure.

    Args:
        factors: A, S `(O, I)` with its mask, B.
        squares: mean square of each entry of Bx, `(I,)`, not negative.
        error: of rounding; it gets the values of S·D and how much an error of each weighs.
        integer_activations: Bx is rounded as well, to 8-bit integers with one scale a token: the estimate of that error,
            `E max_c y_c² / (12 · 127²) · Σ_rc (S_rc D_c)²` with y as `expected_largest_square` has it, counts, too.
    """
    core, columns = factors.core.float(), factors.mask.nonzero()[:, 1].view(factors.mask.shape[0], -1)
    values, energy = core.gather(1, columns), core.square().sum(0)
    best, found = torch.inf, torch.ones_like(squares)
    for scale in _candidates(squares, energy / factors.mask.sum(0).clamp(min=1)):
        own = scale[columns]
        loss = error(values * own, (squares / scale.square())[columns])
        if integer_activations:
            largest = expected_largest_square(squares / scale.square())
            loss += largest / _STEPS * float((energy * scale.square()).sum())
        if loss < best:
            best, found = loss, scale
    return found


def expected_largest_square(variances: Tensor) -> float:
    """`E max_c y_c²` of independent normal `y_c` with these variances `(I,)`, not negative, to a few per cent.

    That is `∫ P(max_c |y_c| > z) 2z dz`. The largest variance times 2 ln I, which it is where all are equal, would be several times
    too much where one column towers over the others, as in language models.
    """
    largest = float(variances.max())
    if not largest > 0:
        return 0.0
    z = torch.linspace(0, math.sqrt(3 * math.log(2 * len(variances)) + 8), _POINTS + 1, dtype=torch.float64)
    sizes = (variances.double() / largest).clamp(min=1e-12).sqrt()
    beyond = torch.erfc(z[1:, None].to(sizes.device) / (math.sqrt(2) * sizes))
    below = torch.log1p(-beyond).sum(1).exp().cpu()
    return largest * float(torch.trapezoid(2 * z * torch.cat([torch.ones(1, dtype=torch.float64), 1 - below]), z))


def apply_gauge(factors: SparseFactors, scale: Tensor) -> SparseFactors:
    """S·D in float32, and D⁻¹·B in B's dtype; of float cores."""
    b = factors.b.float() / scale.view(factors.b.shape[0], -1, 1)
    return replace(factors, core=factors.core.float() * scale, b=b.to(factors.b.dtype))


def _candidates(squares: Tensor, energy: Tensor) -> Iterator[Tensor]:
    inputs, values = (_relative(measure) for measure in (squares, energy))
    for input_power in _INPUT_POWERS:
        for value_power in _VALUE_POWERS:
            scale = inputs**input_power * values**-value_power
            yield scale / scale.log().mean().exp()


def _relative(squares: Tensor) -> Tensor:
    """Roots, relative to their mean square root; 1 where all are zero."""
    mean = squares.mean()
    return (squares / mean).sqrt().clamp(min=_FLOOR) if mean > 0 else torch.ones_like(squares)
