"""GPTQ on a whole weight: round column by column, and make up for each error in the columns that are still to come."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver.baselines import dampen, inverse_factor

#: The nearest values on the grid, for values `(O,)` float32 of one column, whose number comes with them.
Nearest = Callable[[Tensor, int], Tensor]
#: From which share of zeros on they are a mask that pruning has left, and no accident.
_MASK = 0.05


def gptq_weight(
    weight: Tensor,
    gram: Tensor,
    nearest: Nearest,
    *,
    damping: float = 0.01,
    block_columns: int = 128,
    descending: bool = True,
) -> tuple[Tensor, dict[str, int]]:
    """Round W to a grid that is given, after GPTQ (arXiv 2210.17323).

    With U the upper Cholesky factor of the inverse of the damped H, column j in turn, `W[:, j:] −= (w_j − q_j) / U_jj · U[j, j:]`.
    Updates beyond a block of columns wait for its end. Where at least 5 % of the weights are zero, these are a mask:
    they stay zero, and what would come to them is passed on. Computed in float64, rounded in float32.

    Args:
        weight: W `(O, I)`, any float dtype.
        gram: H `(I, I)`, mean of x xᵀ over the calibration tokens.
        nearest: rounds a column, given its number in W. 0 must be on the grid.
        damping: share of the mean diagonal of H that is added to the diagonal.
        block_columns: columns of a block; changes rounding only.
        descending: whether columns go by falling diagonal of H (`actorder: static`), else from left to right.

    Returns:
        The rounded weight `(O, I)` float32; and counts: `dead_channels` (columns whose input is always zero, and whose weights are
        set to zero), `gram_jitter` (times that more damping had to be added), `kept_zeros`.

    Raises:
        ValueError: shapes or numbers that do not fit.
        NumericalError: values that are not finite, or an H that is not positive semi-definite.
    """
    if weight.ndim != 2 or gram.shape != (weight.shape[1], weight.shape[1]) or block_columns < 1 or not damping >= 0:
        raise ValueError(
            f"weight must be (O, I) and gram (I, I), got {tuple(weight.shape)} and {tuple(gram.shape)}; "
            f"{block_columns=} at least 1, {damping=} not negative"
        )
    dead = gram.diagonal() == 0
    zeros = _mask(weight)
    order = _order(gram, descending=descending)
    damped = dampen(gram, damping)
    factor, jitters = inverse_factor(damped[order][:, order])
    columns = weight.double().T.masked_fill(dead[:, None], 0.0)[order]  # column j as row j: contiguous to update
    held = None if zeros is None else zeros.T[order]
    numbers = order.tolist()
    for start in range(0, len(columns), block_columns):
        block, later = slice(start, start + block_columns), slice(start + block_columns, None)
        errors = _round_block(
            columns[block], None if held is None else held[block], factor[block, block], nearest, numbers[block]
        )
        columns[later] -= factor[block, later].T @ errors
    if not bool(columns.isfinite().all()):
        raise NumericalError(f"{int((~columns.isfinite()).sum())} of {weight.numel()} weights are not finite")
    found = torch.empty_like(columns)
    found[order] = columns
    kept = 0 if zeros is None else int(zeros.sum())
    counts = {"dead_channels": int(dead.sum()), "gram_jitter": jitters, "kept_zeros": kept}
    return found.T.to(torch.float32).contiguous(), {name: count for name, count in counts.items() if count}


def _order(gram: Tensor, *, descending: bool) -> Tensor:
    """Numbers of the columns in the order in which they are rounded; columns that are alike from left to right."""
    if not descending:
        return torch.arange(len(gram), device=gram.device)
    return torch.argsort(gram.diagonal(), descending=True, stable=True)


def _mask(weight: Tensor) -> Tensor | None:
    """Which weights are zero, where enough are."""
    zeros = weight == 0
    return zeros if float(zeros.double().mean()) >= _MASK else None


def _round_block(columns: Tensor, zeros: Tensor | None, factor: Tensor, nearest: Nearest, numbers: list[int]) -> Tensor:
    """Round one block in place: columns and zeros `(C, O)`, factor `(C, C)`; returns its errors (w − q) / U_jj `(C, O)`."""
    errors = torch.empty_like(columns)
    for j, number in enumerate(numbers):
        found = nearest(columns[j].float(), number).double()
        if zeros is not None:
            found = found.masked_fill(zeros[j], 0.0)
        torch.div(columns[j] - found, factor[j, j], out=errors[j])
        columns[j + 1 :].addr_(factor[j, j + 1 :], errors[j], alpha=-1.0)
        columns[j] = found
    return errors
