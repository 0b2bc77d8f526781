"""What is computed entry by entry, or row by row, done for some rows at a time: the same bits, without matrices between the steps.

A new matrix of thousands of channels costs more than the step that fills it: its pages come from the system, which clears them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


def row_sums(x: Tensor, make: Callable[[slice], Tensor]) -> Tensor:
    """The sum of each row of a matrix `(O, I)` in float64, float64 `(O,)`; `make` gives its rows, those of x."""
    return torch.cat([make(part).sum(dim=1, dtype=torch.float64) for part in parts(x)])


def summed(sums: Tensor) -> float:
    """The sum of `row_sums`: the bits do not depend on the number of threads, as those of a plain sum do."""
    return float(sums.cpu().sum())
