"""Problems and factors that the solver's tests share."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from armor_recipes.solver.entry import nowag_start
from armor_recipes.solver.exact import ExactProblem
from armor_recipes.solver.patterns import TWO_OF_FOUR, Pattern, magnitude_mask
from armor_recipes.solver.result import Factors

SEEDS = st.integers(0, 2**31)
PATTERNS = ["2:4", "1:4", "1:2", "3:4", "1:8", "4:8", "2:6", "1:3"]
LARGE = ["8:16", "3:12", "11:12", "1:9"]


@st.composite
def cases(draw: st.DrawFn, patterns: list[str]) -> tuple[str, int, int, tuple[int, int]]:
    """A pattern with (O, I) and block sizes that divide them; groups may straddle two blocks."""
    pattern = draw(st.sampled_from(patterns))
    group = int(pattern.split(":")[1])
    d_out = draw(st.sampled_from([4, 6, 8]))
    d_in = group * draw(st.integers(1, max(1, 24 // group)))
    sizes = [draw(st.sampled_from([b for b in range(1, side + 1) if side % b == 0])) for side in (d_out, d_in)]
    return pattern, d_out, d_in, (sizes[0], sizes[1])


def problem_of(seed: int, d_out: int, d_in: int, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(d_out, d_in, generator=generator, dtype=dtype) * (
        0.2 + torch.rand(d_in, generator=generator, dtype=dtype)
    )
    return weight, torch.rand(d_in, generator=generator, dtype=dtype) + 0.05


def random_factors(
    seed: int, d_out: int, d_in: int, sizes: tuple[int, int], pattern: Pattern = TWO_OF_FOUR
) -> tuple[ExactProblem, Factors]:
    """A float64 problem with factors that are neither identity nor optimal."""
    weight, h = problem_of(seed, d_out, d_in, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed + 1)
    start = nowag_start(weight, magnitude_mask(weight.square() * h, pattern), sizes, pattern)
    noise = [torch.randn(x.shape, generator=generator, dtype=x.dtype) * 0.2 for x in (start.a, start.b)]
    factors = Factors(
        start.a + noise[0], start.core, (start.b + noise[1]) * h.sqrt().view(start.b.shape[0], 1, -1), start.index
    )
    return ExactProblem(weight * h.sqrt(), native=False, pattern=pattern), factors
