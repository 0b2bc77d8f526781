"""AWQ's grid, candidates and search, on numbers that are typed in."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armor_recipes.errors import NumericalError
from armor_recipes.solver.awq import GridPoint, candidate, grid, mean_weight_sizes, search, weight_sizes


def test_grids_are_llm_compressors() -> None:
    assert grid(4, duo=True) == (
        GridPoint(0.0, False),
        GridPoint(0.0, True),
        GridPoint(0.5, True),
        GridPoint(1.0, True),
    )
    assert grid(3, duo=False) == (GridPoint(0.0, False), GridPoint(0.5, False), GridPoint(1.0, False))
    assert grid(5, duo="both") == tuple(GridPoint(power, duo) for power in (0.0, 1.0) for duo in (False, True))
    assert [len(grid(20, duo)) for duo in (True, False, "both")] == [20, 20, 20]
    for points, duo in ((2, True), (1, False), (3, "both")):
        with pytest.raises(ValueError, match=f"a grid of {points} points has no end"):
            grid(points, duo)  # type: ignore[arg-type]


def test_candidates_by_hand() -> None:
    activations, weights = torch.tensor([1.0, 16.0]), torch.tensor([0.25, 1.0])
    assert candidate(GridPoint(0.0, False), activations, None).tolist() == [1, 1]
    assert candidate(GridPoint(0.5, False), activations, weights).tolist() == pytest.approx([0.5, 2.0])
    assert candidate(GridPoint(0.5, True), activations, weights).tolist() == pytest.approx([0.7071, 1.4142], rel=1e-3)
    assert candidate(GridPoint(1.0, False), torch.tensor([0.0, 1.0]), None).tolist() == pytest.approx([0.01, 100.0])


def test_sizes_are_relative_to_what_has_one_scale() -> None:
    weight = torch.tensor([[1.0, -2.0, 4.0], [3.0, 0.0, -1.0]])
    assert weight_sizes(weight, (1, 3)).tolist() == pytest.approx([1.25, 0.5, 1 + 1 / 3], rel=1e-5)
    assert weight_sizes(weight, (1, 2)).tolist() == pytest.approx([1.5, 1.0, 2.0], rel=1e-5)
    assert weight_sizes(weight, (2, 2)).tolist() == pytest.approx([4 / 3, 2 / 3, 1.25], rel=1e-5)
    both = mean_weight_sizes([(weight, (1, 3)), (2 * weight, (1, 3))])
    assert both.tolist() == pytest.approx([0.625, 0.25, 2 / 3], rel=1e-5)


@given(st.lists(st.floats(0, 1e4), min_size=2, max_size=6), st.floats(0, 1), st.booleans())
def test_scales_lie_around_one(sizes: list[float], power: float, duo: bool) -> None:
    scales = candidate(GridPoint(power, duo), torch.tensor(sizes), torch.tensor(sizes).sqrt() / 100)
    assert bool(scales.isfinite().all())
    assert float(scales.max() * scales.min()) == pytest.approx(1)


def test_the_least_loss_wins_and_the_first_of_equals() -> None:
    losses = iter([3.0, math.nan, 1.0, 2.0, 1.0])
    points = grid(5, duo=False)
    found = search(points, lambda point: torch.full((2,), point.power), lambda _: next(losses))
    assert (found.best, found.loss, found.first_loss) == (points[2], 1.0, 3.0)
    assert found.scales.tolist() == [0.5, 0.5]
    with pytest.raises(NumericalError, match="no candidate of the grid gives a finite loss"):
        search(points, lambda _: torch.ones(1), lambda _: math.inf)
