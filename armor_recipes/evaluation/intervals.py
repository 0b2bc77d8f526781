"""95 % intervals: of a rate, by Wilson; of a mean over samples, by the bootstrap."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

#: The normal distribution's 97.5 % point.
NORMAL = 1.959963984540054
_RESAMPLES = 1000
#: Draws that are held at once.
_AT_ONCE = 1 << 22

Sample = NDArray[np.float64]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The interval of a rate of `hits` among `count` (at least 1): Wilson's score interval, which lies in [0, 1]."""
    rate, spread = hits / count, NORMAL**2 / count
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + spread**2 / 4) / (1 + spread)
    # At the ends one bound is the rate itself, which rounding may miss.
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == count else centre + half)


def bootstrap(sample: Sample, *, weights: Sample | None = None, seed: int = 0) -> tuple[float, float] | None:
    """The percentile interval of the mean of a sample `(N,)` from 1,000 resamples; None of fewer than two values.

    With `weights` `(N,)` it is of the sum of the values over that of their weights, drawn together. Draws come from a generator
    of its own; equal samples give equal bits, whatever the number of threads.
    """
    means = []
    for drawn in _resamples(len(sample), seed):
        values = sample[drawn]
        means.append(values.mean(axis=1) if weights is None else values.sum(axis=1) / weights[drawn].sum(axis=1))
    return _percentiles(np.concatenate(means)) if means else None


def quantile(groups: Sequence[Sample], share: float) -> float:
    """The smallest value of all groups that is at least as large as that share of their values."""
    values = np.sort(np.concatenate(groups))
    return float(values[math.ceil(share * len(values)) - 1])


def bootstrap_quantile(groups: Sequence[Sample], share: float, *, seed: int = 0) -> tuple[float, float] | None:
    """The percentile interval of `quantile`, from resamples of whole groups; None of fewer than two."""
    group = np.repeat(np.arange(len(groups)), list(map(len, groups)))
    values = np.concatenate(groups)
    order = np.argsort(values, kind="stable")
    values, group = values[order], group[order]
    found = []
    for drawn in (row for rows in _resamples(len(groups), seed) for row in rows):
        below = np.bincount(drawn, minlength=len(groups))[group].cumsum()
        found.append(values[np.searchsorted(below, math.ceil(share * below[-1]))])
    return _percentiles(np.array(found)) if found else None


def _resamples(count: int, seed: int) -> Iterator[NDArray[np.int64]]:
    """1,000 rows of `count` places drawn with replacement, some rows `(R, count)` at a time; none of fewer than two places."""
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _AT_ONCE // max(1, count))
    for start in range(0, _RESAMPLES if count > 1 else 0, rows):
        size = min(rows, _RESAMPLES - start), count
        yield torch.randint(count, size, generator=generator).numpy()


def _percentiles(figures: Sample) -> tuple[float, float]:
    low, high = np.quantile(figures, [0.025, 0.975]).tolist()
    return low, high
