"""Published pruning methods that ARMOR is compared with: magnitude, Wanda, SparseGPT, and a low-rank correction after any.

They work on the raw weight, without normalisation, as their papers do. NoWag-P is `entry.nowag_mask`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver.normalize import fill_dead_channels
from armor_recipes.solver.spd import UP_TO_A_TENTH, cholesky


@dataclass(frozen=True, slots=True)
class _Choice:
    """How weights are chosen: n_keep of each group, up to a share of a block, or (neither) by a mask that is given."""

    n_keep: int | None
    group: int
    sparsity: float | None


def magnitude_scores(weight: Tensor) -> Tensor:
    """|W_ij|, float32 `(O, I)`."""
    return weight.float().abs()


def wanda_scores(weight: Tensor, second_moment: Tensor) -> Tensor:
    """|W_ij| · √h_j, float32 `(O, I)`, for h `(I,)` the mean of x² (Wanda, arXiv 2306.11695, Eq. 1, up to a factor).

    Raises NumericalError where h is not finite or negative. A dead channel scores 0.
    """
    fill_dead_channels(second_moment)
    return weight.float().abs() * second_moment.float().sqrt()


def sparsegpt(
    weight: Tensor,
    gram: Tensor,
    *,
    damping: float = 0.01,
    block_columns: int = 128,
    mask: Tensor | None = None,
    n_keep: int = 2,
    group: int = 4,
    sparsity: float | None = None,
    keep_zeros: bool = False,
) -> tuple[Tensor, Tensor, dict[str, int]]:
    """Prune to n_keep of every `group` columns, making up for each removed weight in the columns to its right.

    SparseGPT (arXiv 2301.00774, Algorithm 1): with U the upper Cholesky factor of the inverse of the damped H, column j in
    turn, `W[:, j:] −= (w_j − ŵ_j) / U_jj · U[j, j:]`. At the first column of a group its mask keeps the largest
    `(w_j / U_jj)²` of the weights as updated so far, ties to the lower index. Updates beyond a block of columns wait for
    its end. With `sparsity` there are no groups: at the first column of a block all of its weights, over all rows, compare,
    and those up to the one of rank ⌊sparsity · n⌋ from 0 are removed, as in llm-compressor. Computed in float64.

    Args:
        weight: W `(O, I)`, any float dtype.
        gram: H `(I, I)`, mean of x xᵀ over the calibration tokens.
        damping: share of the mean diagonal of H that is added to the diagonal.
        block_columns: columns of a block, a multiple of `group`; but with `sparsity` it changes rounding only.
        mask: bool `(O, I)`; given, it is what is kept.
        n_keep: kept weights in each group.
        group: consecutive columns of a group.
        sparsity: share of the weights to remove, at least 0 and below 1, in the place of groups.
        keep_zeros: whether weights that are zero already stay so and count as removed.

    Returns:
        The pruned weight `(O, I)` float32; its mask, bool `(O, I)`; and counts: `dead_channels` (columns whose input is
        always zero, and whose weights are set to zero), `gram_jitter` (times that more damping had to be added).

    Raises:
        ValueError: shapes or numbers that do not fit.
        NumericalError: values that are not finite, an H that is not positive semi-definite, or more zeros to keep than
            are to be removed.
    """
    choice = _Choice(None if mask is not None or sparsity is not None else n_keep, group, sparsity)
    _check_sizes(weight, gram, mask, choice, damping=damping, block_columns=block_columns, n_keep=n_keep)
    dead = gram.diagonal() == 0
    factor, jitters = inverse_factor(dampen(gram, damping))
    columns = weight.double().T.contiguous().masked_fill_(dead[:, None], 0.0)  # column j as row j: contiguous to update
    zeros = _zeros(columns, 1 - n_keep / group if sparsity is None else sparsity) if keep_zeros else None
    keep = torch.ones_like(columns, dtype=torch.bool) if mask is None else mask.T.contiguous()
    for start in range(0, len(columns), block_columns):
        block, later = slice(start, start + block_columns), slice(start + block_columns, None)
        held = None if zeros is None else zeros[block]
        errors = _prune_block(columns[block], keep[block], factor[block, block], choice, held)
        columns[later] -= factor[block, later].T @ errors
        if zeros is not None:
            columns[later] = columns[later].masked_fill_(zeros[later], 0.0)
    if not bool(columns.isfinite().all()):
        raise NumericalError(f"{int((~columns.isfinite()).sum())} of {weight.numel()} weights are not finite")
    pruned = columns.masked_fill_(~keep, 0.0).T.to(torch.float32).contiguous()
    counts = {"dead_channels": int(dead.sum()), "gram_jitter": jitters}
    return pruned, keep.T.contiguous(), {name: count for name, count in counts.items() if count}


def unstructured_mask(scores: Tensor, sparsity: float) -> Tensor:
    """Bool mask of `(O, I)` that removes the ⌊sparsity · I⌋ smallest scores of each row, ties at the lower index first."""
    removed = torch.sort(scores, dim=1, stable=True).indices[:, : int(scores.shape[1] * sparsity)]
    return torch.ones_like(scores, dtype=torch.bool).scatter_(1, removed, value=False)


def dampen(gram: Tensor, damping: float) -> Tensor:
    """H + damping · mean(diag H) · I, float64 `(I, I)`; dead channels (H_jj = 0) get the mean on the diagonal instead.

    The mean is over channels that are not dead, so a scaled H gives a scaled result; it is 1 where all are. Raises NumericalError
    where a value is not finite, or a diagonal entry is negative.
    """
    if not bool(gram.isfinite().all()):
        raise NumericalError(
            f"{int((~gram.isfinite()).sum())} of {gram.numel()} entries of the Gram matrix are not finite"
        )
    diagonal = gram.diagonal().double()
    filled, dead = fill_dead_channels(diagonal)
    mean = filled.mean() if dead == len(diagonal) else diagonal.sum() / (len(diagonal) - dead)
    damped = gram.double()
    damped = damped.clone() if damped is gram else damped
    damped.diagonal().copy_(torch.where(diagonal > 0, filled + damping * mean, mean))
    return damped


def low_rank_adapter(weight: Tensor, pruned: Tensor, moment: Tensor, *, rank: int) -> tuple[Tensor, Tensor]:
    """The best correction of rank r: L `(O, r)` and R `(r, I)`, float32, that minimise tr(F H Fᵀ) for F = W − Ŵ − L·R.

    `moment` is H `(I, I)`, or its diagonal h `(I,)`. With E = W − Ŵ, L holds the r largest eigenvectors of E H Eᵀ, which are
    the left singular vectors of E·H^½, and R = LᵀE. The weighted error is never above that of Ŵ. Solved in float64, in
    a basis of E's columns, so that the eigenproblem has the smaller of W's sides.

    Raises ValueError for shapes that do not fit or a rank that is not in 1 … min(O, I).
    """
    d_out, d_in = weight.shape
    if pruned.shape != weight.shape or moment.shape not in ((d_in,), (d_in, d_in)):
        raise ValueError(
            f"weight and pruned must be (O, I), moment (I,) or (I, I), got {tuple(weight.shape)}, {tuple(pruned.shape)} "
            f"and {tuple(moment.shape)}"
        )
    if not 1 <= rank <= min(d_out, d_in):
        raise ValueError(f"{rank=} is not in 1 to {min(d_out, d_in)}, the smaller side of the weight")
    error = weight.double() - pruned.double()
    basis, inner = torch.linalg.qr(error)
    weighted = inner * moment.double() if moment.ndim == 1 else inner @ moment.double()
    vectors = torch.linalg.eigh(weighted @ inner.T).eigenvectors[:, -rank:].flip(1)  # eigenvalues come in rising order
    left = basis @ vectors
    return left.float(), (left.T @ error).float()


def adapter_rank(d_out: int, d_in: int, factor_values: int) -> int:
    """The largest rank r whose (O + I) · r values are not more than `factor_values`, at most the smaller side.

    `factor_values` is O · b_o + I · b_i for ARMOR's A and B: equal bytes in one dtype. For square blocks that is r = b.
    """
    return min(factor_values // (d_out + d_in), d_out, d_in)


def _prune_block(columns: Tensor, keep: Tensor, factor: Tensor, choice: _Choice, zeros: Tensor | None) -> Tensor:
    """Prune one block in place: columns, keep and zeros `(C, O)`, factor `(C, C)`; returns its errors (w − ŵ) / U_jj `(C, O)`."""
    errors, diagonal = torch.empty_like(columns), factor.diagonal()[:, None]
    if choice.sparsity is not None:
        keep.copy_(_above((columns / diagonal).square(), choice.sparsity, zeros))
    for j in range(len(columns)):
        if choice.n_keep is not None and j % choice.group == 0:
            part = slice(j, j + choice.group)
            scores = (columns[part] / diagonal[part]).square()
            keep[part] = _largest(scores if zeros is None else scores.masked_fill_(zeros[part], 0.0), choice.n_keep)
            if zeros is not None:
                keep[part] &= ~zeros[part]
        torch.div(columns[j].masked_fill(keep[j], 0.0), factor[j, j], out=errors[j])
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1.0)
    return errors


def _above(scores: Tensor, sparsity: float, zeros: Tensor | None) -> Tensor:
    """Bool mask of the scores `(C, O)` above that of rank ⌊sparsity · n⌋; with enough zeros to keep, of all but these."""
    rank = int(scores.numel() * sparsity)
    if zeros is None:
        zeros = torch.zeros_like(scores, dtype=torch.bool)
    elif rank <= int(zeros.sum()):
        return ~zeros
    scores = scores.masked_fill(zeros, 0.0)
    return scores > scores.flatten().kthvalue(rank + 1).values


def _zeros(columns: Tensor, share: float) -> Tensor:
    """Which of the weights are zero. Raises NumericalError where more are than the share that is to be removed."""
    zeros = columns == 0
    found = float(zeros.double().mean())
    if found > share:
        raise NumericalError(
            f"{100 * found:.1f} % of the weights are zero already, more than the {100 * share:.1f} % to be removed: prune "
            "more, or set preserve_sparsity_mask: false"
        )
    return zeros


def _largest(scores: Tensor, n_keep: int) -> Tensor:
    """Bool mask of the n_keep largest of each column of `(M, O)`, ties to the lower index."""
    order = torch.sort(scores, dim=0, descending=True, stable=True).indices[:n_keep]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(0, order, value=True)


def inverse_factor(gram: Tensor) -> tuple[Tensor, int]:
    """U, upper triangular with H⁻¹ = UᵀU, for H `(I, I)` float64; and how often jitter had to be added.

    With rows and columns in reverse order H = L Lᵀ gives H = R Rᵀ with R upper triangular, and U = R⁻¹: one
    factorisation, and no inverse of H. Raises NumericalError where a tenth of the mean diagonal is not jitter enough.
    """
    lower, retries = cholesky(
        gram.flip(0, 1),
        ridges=UP_TO_A_TENTH,
        what="Gram matrices of the inputs",
        advice="calibrate on more tokens, or set a larger `damping`",
    )
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True), retries


def _check_sizes(
    weight: Tensor,
    gram: Tensor,
    mask: Tensor | None,
    choice: _Choice,
    *,
    damping: float,
    block_columns: int,
    n_keep: int,
) -> None:
    group = choice.group
    if weight.ndim != 2 or gram.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(f"weight must be (O, I) and gram (I, I), got {tuple(weight.shape)} and {tuple(gram.shape)}")
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    if not damping >= 0:
        raise ValueError(f"{damping=} must not be negative")
    if choice.sparsity is not None:
        if not 0 <= choice.sparsity < 1 or mask is not None or block_columns < 1:
            raise ValueError(
                f"sparsity={choice.sparsity} must be in [0, 1), without a mask; {block_columns=} at least 1"
            )
        return
    if not 1 <= n_keep <= group or weight.shape[1] % group:
        raise ValueError(f"{n_keep=} of {group=} does not fit d_in={weight.shape[1]}")
    if block_columns < 1 or block_columns % group:
        raise ValueError(f"{block_columns=} must be a positive multiple of {group=}")
