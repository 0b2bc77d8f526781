"""NoWag normalisation and the weighted loss that the `diagonal` objective minimises (ARMOR §3, Eq. 2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver.rows import parts, stable_sum, summed

NORM_EPSILON = 1e-5
#: Of a module's largest mean square gradient: what is below counts as that, or such a row would be free to become anything.
LEAST_GRADIENT = 1e-6


@dataclass(frozen=True, slots=True)
class Normalized:
    """`W = diag(rows) · weight · diag(columns)`: weight `(O, I)`, rows `(O,)`, columns `(I,)`."""

    weight: Tensor
    rows: Tensor
    columns: Tensor


def nowag_normalize(weight: Tensor) -> Normalized:
    """W̄: each column of W `(O, I)` divided by its 2-norm + 1e-5, then each row of the result by its 2-norm + 1e-5.

    Raises NumericalError where a norm is out of the dtype's range: W̄ would be zero.
    """
    return normalized(weight, normalize=True)


def _column_norms(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """What `nowag_normalize` divides the columns of W `(O, I)` by, computed in `dtype`, `(I,)`."""
    norms = [torch.linalg.vector_norm(weight[:, part].to(dtype), dim=0) for part in parts(weight.T)]
    columns = torch.cat(norms) + NORM_EPSILON
    if not bool(torch.isfinite(columns).all()):
        raise NumericalError(f"the weight's columns have 2-norms beyond the range of {dtype}: scale the weight down")
    return columns


def _rows_normalized(weight: Tensor, columns: Tensor | None, root: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows of W̄ `(n, I)` from those of W, and what they were divided by, `(n,)`.

    `columns` `(I,)` are the norms of W's columns, None without normalisation; `root` `(n,)` is √ω, None where all rows count once.
    """
    rows = torch.ones_like(weight[:, 0])
    if columns is not None:
        scaled = weight / columns
        rows = torch.linalg.vector_norm(scaled, dim=1) + NORM_EPSILON
        weight = scaled / rows[:, None]
    return (weight, rows) if root is None else (weight * root[:, None], rows / root)


def normalized(weight: Tensor, *, normalize: bool, row_weights: Tensor | None = None) -> Normalized:
    """`nowag_normalize`, or W as it is with norms of one.

    With `row_weights` ω `(O,)`, all above 0, row i is multiplied by √ω_i besides, so that its squared error counts ω_i times.
    """
    columns = _column_norms(weight, weight.dtype) if normalize else None
    root = None if row_weights is None else row_weights.to(weight).sqrt()
    found, rows = torch.empty_like(weight), torch.empty_like(weight[:, 0])
    for part in parts(weight):
        found[part], rows[part] = _rows_normalized(weight[part], columns, None if root is None else root[part])
    return Normalized(found, rows, torch.ones_like(weight[0]) if columns is None else columns)


def gradient_row_weights(
    weight: Tensor, gradients: Tensor, power: float, *, normalize: bool = True
) -> tuple[Tensor, int]:
    """ω_i = (r_i² g_i)^power, scaled to mean 1, float32 `(O,)`; and how many rows have no gradient.

    g `(O,)` is the mean square of the gradient of the model's loss at each of the module's outputs, r_i the norm by which row i of
    W `(O, I)` is divided (1 without normalisation). So power 0 weighs rows as NoWag does, and power 1 counts squared errors of W
    itself by g: the diagonal of the Fisher information. A g below 1e-6 of the largest counts as that. All ω are 1 where no row
    has a gradient.

    Raises NumericalError where a g is not finite or negative.
    """
    bad = int((~torch.isfinite(gradients) | (gradients < 0)).sum())
    if bad:
        raise NumericalError(
            f"{bad} of {gradients.numel()} mean squares of output gradients are not finite or are negative"
        )
    g, rows = gradients.double(), normalized(weight.double(), normalize=normalize).rows
    without = int((g == 0).sum())
    largest = g.max()
    if not largest > 0:
        return torch.ones_like(gradients, dtype=torch.float32), without
    logarithms = power * (rows.square().log() + g.clamp(min=LEAST_GRADIENT * float(largest)).log())
    found = (logarithms - logarithms.max()).exp()
    return (found / found.mean()).float(), without


def fill_dead_channels(second_moment: Tensor) -> tuple[Tensor, int]:
    """Replace entries of h `(I,)` that are zero by the mean of the others; returns the filled h and how many there were.

    Where every channel is dead (a module behind one of zeros) all become 1: nothing that is done there changes an output.
    Raises NumericalError where a value is not finite or negative.
    """
    if not bool(torch.isfinite(second_moment).all()) or bool((second_moment < 0).any()):
        bad = int((~torch.isfinite(second_moment) | (second_moment < 0)).sum())
        raise NumericalError(f"{bad} of {second_moment.numel()} input second moments are not finite or are negative")
    dead = second_moment == 0
    count = int(dead.sum())
    if count == second_moment.numel():
        return torch.ones_like(second_moment), count
    if count == 0:
        return second_moment, 0
    return torch.where(dead, second_moment[~dead].mean(), second_moment), count


def relative_loss(
    weight: Tensor,
    second_moment: Tensor,
    approximation: Tensor,
    *,
    normalize: bool = True,
    row_weights: Tensor | None = None,
) -> float:
    """`Σ_ij ω_i (W̄ − D_r⁻¹ Ŵ D_c⁻¹)²_ij h_j / Σ_ij ω_i W̄²_ij h_j` for raw W and Ŵ `(O, I)`, summed in float64; ω is 1 unless given.

    0 is a perfect reconstruction, 1 is Ŵ = 0. Dead channels of h `(I,)` are filled as in `fill_dead_channels`.
    """
    h = fill_dead_channels(second_moment.double())[0]
    columns = _column_norms(weight, torch.float64) if normalize else None
    root = None if row_weights is None else row_weights.double().sqrt()
    errors, wholes = [], []
    for part in parts(weight):
        normal, rows = _rows_normalized(weight[part].double(), columns, None if root is None else root[part])
        fitted = approximation[part].double()
        error = normal - (fitted if columns is None else fitted / columns) / rows[:, None]
        errors.append((error.square() * h).sum(dim=1))
        wholes.append((normal.square() * h).sum(dim=1))
    return share_of(summed(errors), summed(wholes))


def share_of(squared_error: float, total: float) -> float:
    """A squared error relative to that of Ŵ = 0; for a weight of zeros 0 where it is met, and else infinite."""
    if total > 0:
        return squared_error / total
    return 0.0 if squared_error == 0 else math.inf


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """`‖W − Ŵ‖ / ‖W‖` in the Frobenius norm, for raw weights `(O, I)`; 0 for W = Ŵ = 0."""
    whole = stable_sum(weight, lambda part: weight[part].double().square())
    apart = stable_sum(weight, lambda part: (weight[part] - approximation[part]).double().square())
    return (apart / whole) ** 0.5 if whole > 0 else 0.0
