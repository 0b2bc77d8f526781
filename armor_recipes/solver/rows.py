"""What is computed entry by entry, or row by row, done for some rows at a time: the same bits, without matrices between the steps.

A new matrix of thousands of channels costs more than the step that fills it: its pages come from the system, which clears them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

#: Entries at a time: in float64 they stay in the second cache.
_ENTRIES = 1 << 17
#: Rows at least: a sum along fewer could be shared among threads, which changes its bits.
_ROWS = 64


def parts(x: Tensor) -> Iterator[slice]:
    """Slices of the rows of x `(O, ...)` that take turns; all of them at once where x is on no CPU."""
    rows = len(x)
    size = max(_ROWS, _ENTRIES * rows // max(1, x.numel())) if x.is_cpu else max(1, rows)
    return (slice(first, first + size) for first in range(0, max(1, rows), size))


def stable_sum(x: Tensor, rows_of: Callable[[slice], Tensor] | None = None) -> float:
    """Sum of `(O, I)` in float64, row by row: the bits do not depend on the number of threads, as those of a plain sum do.

    With `rows_of` it is that of another matrix as large, whose rows that gives some at a time.
    """
    return summed(
        [(x[part] if rows_of is None else rows_of(part)).sum(dim=1, dtype=torch.float64) for part in parts(x)]
    )


def summed(row_sums: Sequence[Tensor]) -> float:
    """The sum of a matrix whose rows' sums these are, float64, in their order."""
    return float(torch.cat([*row_sums]).cpu().sum())
