"""Symmetric positive definite matrices: the one place where they are factorised (see `docs/solver.md`).

A matrix that cannot be factorised as it is gets a ridge, a share of its mean diagonal, from a short list that the caller
names. Every failure is counted; where the last ridge is too little the error says what to do. All in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from armor_recipes.errors import NumericalError

#: Ridges by their use. Normal equations: an increment with a ridge is a proximal step, which cannot raise the loss, whatever
#: the ridge. An inverse of all inputs: none at first, then up to a tenth. As it is: damping is the user's choice.
NORMAL_EQUATIONS = (1e-6, 1e-5, 1e-4, 1e-3)
UP_TO_A_TENTH = (0.0, 1e-4, 1e-3, 1e-2, 1e-1)
AS_IT_IS = (0.0,)


def cholesky(gram: Tensor, *, ridges: Sequence[float] = AS_IT_IS, what: str, advice: str) -> tuple[Tensor, int]:
    """L with `L Lᵀ = G + ε · mean(diag G) · I`, lower triangular, and how many times a matrix had to be tried again.

    ε is the first of `ridges` with which the matrix can be factorised, for each matrix of a batch by itself. One whose mean
    diagonal is not positive has nothing to take a share of and gets I as its ridge, so that zeros become the identity. After
    `psd_safe_cholesky` of linear_operator, whose ridge is absolute.

    Args:
        gram: G `(n, n)` or `(batch, n, n)`, any float dtype; its lower triangle is read.
        ridges: shares of the mean diagonal, rising. 0 leaves G as it is.
        what: what the matrices are, in the plural, for the error.
        advice: what the user can do, for the error.

    Returns:
        L float64, of G's shape; and the number of failed factorisations, summed over matrices and tries.

    Raises:
        NumericalError: where a matrix is not positive definite even with the last ridge (or is not finite).
    """
    gram = gram.double()
    mean = _mean_diagonal(gram)
    ridge, failed, retries = torch.zeros_like(mean), torch.ones_like(mean, dtype=torch.bool), 0
    for share in ridges:
        ridge = torch.where(failed, _ridge(mean, share), ridge)
        lower, info = torch.linalg.cholesky_ex(_shifted(gram, ridge) if share else gram)
        failed = info != 0
        count = int(failed.sum())
        if count == 0:
            return lower, retries
        retries += count
    worst = float(mean[failed].min())
    raise NumericalError(
        f"{what}: {count} of {failed.numel()} ({gram.shape[-1]}x{gram.shape[-1]}, mean diagonal {worst:g}) are not positive "
        + "definite"
        + (f" even with {ridges[-1]:g} of it added" if ridges[-1] else "")
        + f": {advice}"
    )


def with_ridge(gram: Tensor, share: float) -> Tensor:
    """`G + share · mean(diag G) · I` in float64 for `(..., n, n)`; `G + I` where that mean is not positive."""
    gram = gram.double()
    return _shifted(gram, _ridge(_mean_diagonal(gram), share))


def inverse_or_zero(gram: Tensor, *, least_pivot: float) -> Tensor:
    """G⁻¹ of each of `(..., n, n)` in float64, and zero where G, scaled to a unit diagonal, is singular.

    That is where its Cholesky factorisation fails or has a squared pivot of at most `least_pivot`. No ridge, and no error:
    for many small matrices of which some may be left out.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1).double()
    root = torch.where(diagonal > 0, diagonal, torch.ones_like(diagonal)).sqrt()
    scale = root[..., :, None] * root[..., None, :]
    factor, info = torch.linalg.cholesky_ex(gram / scale)
    regular = ((info == 0) & (factor.diagonal(dim1=-2, dim2=-1).square().amin(-1) > least_pivot))[..., None, None]
    eye = torch.eye(gram.shape[-1], dtype=factor.dtype, device=factor.device)
    inverse: Tensor = torch.cholesky_inverse(torch.where(regular, factor, eye)) / scale * regular
    return inverse


def _mean_diagonal(gram: Tensor) -> Tensor:
    mean: Tensor = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    return mean


def _ridge(mean: Tensor, share: float) -> Tensor:
    return torch.where(mean > 0, share * mean, torch.ones_like(mean))


def _shifted(gram: Tensor, ridge: Tensor) -> Tensor:
    return gram + ridge[..., None, None] * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
