"""NoWag normalisation and the weighted loss that the `diagonal` objective minimises (ARMOR §3, Eq. 2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver.blockdiag import stable_sum

NORM_EPSILON = 1e-5


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
    columns = torch.linalg.vector_norm(weight, dim=0) + NORM_EPSILON
    if not bool(torch.isfinite(columns).all()):
        raise NumericalError(
            f"the weight's columns have 2-norms beyond the range of {weight.dtype}: scale the weight down"
        )
    scaled = weight / columns
    rows = torch.linalg.vector_norm(scaled, dim=1) + NORM_EPSILON
    return Normalized(weight=scaled / rows[:, None], rows=rows, columns=columns)


def normalized(weight: Tensor, *, normalize: bool) -> Normalized:
    """`nowag_normalize`, or W as it is with norms of one."""
    if normalize:
        return nowag_normalize(weight)
    return Normalized(weight, rows=torch.ones_like(weight[:, 0]), columns=torch.ones_like(weight[0]))


def fill_dead_channels(second_moment: Tensor) -> tuple[Tensor, int]:
    """Replace entries of h `(I,)` that are zero by the mean of the others; returns the filled h and how many there were.

    Raises NumericalError where a value is not finite or negative, or where every channel is dead.
    """
    if not bool(torch.isfinite(second_moment).all()) or bool((second_moment < 0).any()):
        bad = int((~torch.isfinite(second_moment) | (second_moment < 0)).sum())
        raise NumericalError(f"{bad} of {second_moment.numel()} input second moments are not finite or are negative")
    dead = second_moment == 0
    count = int(dead.sum())
    if count == second_moment.numel():
        raise NumericalError(
            f"all {count} input channels have second moment 0: no calibration signal reaches this layer"
        )
    if count == 0:
        return second_moment, 0
    return torch.where(dead, second_moment[~dead].mean(), second_moment), count


def relative_loss(weight: Tensor, second_moment: Tensor, approximation: Tensor, *, normalize: bool = True) -> float:
    """`Σ_ij (W̄ − D_r⁻¹ Ŵ D_c⁻¹)²_ij h_j / Σ_ij W̄²_ij h_j` for raw W and Ŵ `(O, I)`, summed in float64.

    0 is a perfect reconstruction, 1 is Ŵ = 0. Dead channels of h `(I,)` are filled as in `fill_dead_channels`.
    """
    h = fill_dead_channels(second_moment.double())[0]
    normal = normalized(weight.double(), normalize=normalize)
    error = normal.weight - approximation.double() / normal.columns / normal.rows[:, None]
    return stable_sum(error.square() * h) / stable_sum(normal.weight.square() * h)


def relative_error(weight: Tensor, approximation: Tensor) -> float:
    """`‖W − Ŵ‖ / ‖W‖` in the Frobenius norm, for raw weights `(O, I)`; 0 for W = Ŵ = 0."""
    total = stable_sum(weight.double().square())
    return (stable_sum((weight - approximation).double().square()) / total) ** 0.5 if total > 0 else 0.0
