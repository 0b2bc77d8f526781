"""95 % intervals: of a rate, by Wilson; of a mean over samples, by the bootstrap."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

#: The normal distribution's 97.5 % point.
_Z = 1.959963984540054
_RESAMPLES = 1000
#: Draws that are held at once.
_AT_ONCE = 1 << 22

Sample = NDArray[np.float64]


def wilson(hits: int, count: int) -> tuple[float, float]:
    """The interval of a rate of `hits` among `count` (at least 1): Wilson's score interval, which lies in [0, 1]."""
    rate, spread = hits / count, _Z**2 / count
    centre = (rate + spread / 2) / (1 + spread)
    half = math.sqrt(rate * (1 - rate) * spread + spread**2 / 4) / (1 + spread)
    # At the ends one bound is the rate itself, which rounding may miss.
    return (0.0 if hits == 0 else centre - half), (1.0 if hits == count else centre + half)


def bootstrap(sample: Sample, *, seed: int = 0) -> tuple[float, float] | None:
    """The percentile interval of the mean of a sample `(N,)` from 1,000 resamples; None of fewer than two values.

    Draws come from a generator of its own; equal samples give equal bits, whatever the number of threads.
    """
    count = len(sample)
    if count < 2:
        return None
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, _AT_ONCE // count)
    means = []
    for start in range(0, _RESAMPLES, rows):
        size = min(rows, _RESAMPLES - start), count
        means.append(sample[torch.randint(count, size, generator=generator).numpy()].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975]).tolist()
    return low, high
