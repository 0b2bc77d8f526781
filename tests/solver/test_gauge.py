"""The scale between B and S that is chosen before a core is rounded."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armor_recipes.solver import relative_loss
from armor_recipes.solver.gauge import apply_gauge, choose_gauge, expected_largest_square
from armor_recipes.solver.quantize import input_squares, requantize
from armor_recipes.solver.result import SparseFactors


def factors(seed: int = 0, *, spread: float = 2.0, rows: int = 16, columns: int = 64) -> SparseFactors:
    """Columns of very different size, as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    mask = (torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1) < 2).view(rows, columns)
    scale = (spread * torch.randn(columns, generator=generator)).exp()
    a, b = (torch.eye(8) + 0.1 * torch.randn(side // 8, 8, 8, generator=generator) for side in (rows, columns))
    core = torch.randn(rows, columns, generator=generator) * mask / scale
    return SparseFactors(a, core, mask, b * scale.view(-1, 8, 1))


@given(st.integers(0, 50))
def test_a_gauge_leaves_product_and_mask(seed: int) -> None:
    given_ = factors(seed)
    found = apply_gauge(given_, (0.5 * torch.randn(64, generator=torch.Generator().manual_seed(seed))).exp())
    torch.testing.assert_close(found.dense(), given_.dense(), rtol=1e-4, atol=1e-4)
    assert torch.equal(found.core != 0, given_.core != 0)


def test_columns_of_different_size_are_made_alike_before_they_are_rounded() -> None:
    given_, h = factors(), torch.ones(64)
    losses = {}
    for gauge in (False, True):
        found = requantize(given_, h, num_bits=4, group_size=8, iterations=0, gauge=gauge)
        losses[gauge] = relative_loss(given_.dense(), h, found.factors.dense(), normalize=False)
    assert losses[True] < 0.5 * losses[False]


def test_one_stays_where_nothing_is_better() -> None:
    """Values that the grid holds are rounded without an error, which no other scale beats."""
    given_ = factors()
    scale = choose_gauge(given_, input_squares(given_.b, torch.ones(64)), lambda _values, _weights: 0.0)
    assert torch.equal(scale, torch.ones(64))


def test_activations_of_integers_want_entries_alike() -> None:
    given_ = factors(spread=1.5)
    squares = input_squares(given_.b, torch.ones(64))
    scale = choose_gauge(given_, squares, lambda _values, _weights: 0.0, integer_activations=True)
    after = squares / scale.square()
    assert float(after.max() / after.mean()) < 0.1 * float(squares.max() / squares.mean())


@pytest.mark.parametrize("columns", [1, 2, 64, 4096])
@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0])
def test_the_largest_square_is_what_drawing_gives(columns: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(columns)
    variances = (spread * torch.randn(columns, generator=generator)).exp()
    drawn = torch.randn(4000, columns, generator=generator) * variances.sqrt()
    wanted = float(drawn.square().amax(1).mean())
    assert abs(expected_largest_square(variances) - wanted) < 0.08 * wanted


def test_one_column_that_towers_is_its_own_variance() -> None:
    variances = torch.full((1000,), 1e-6)
    variances[7] = 4.0
    assert abs(expected_largest_square(variances) - 4.0) < 0.02 * 4.0
    assert expected_largest_square(torch.zeros(5)) == 0.0
    assert expected_largest_square(torch.tensor([0.0, 0.0, 9.0])) == pytest.approx(9.0, rel=0.05)


def test_zeros_and_dead_columns_have_finite_scales() -> None:
    given_ = factors()
    given_.core[:, :4] = 0
    given_.b[0] = 0
    scale = choose_gauge(given_, input_squares(given_.b, torch.ones(64)), lambda values, _: -float(values.abs().sum()))
    assert bool(scale.isfinite().all())
    assert bool((scale > 0).all())
    empty = SparseFactors(given_.a, 0 * given_.core, given_.mask, given_.b)
    assert bool(requantize(empty, torch.ones(64), num_bits=4, iterations=1).factors.b.isfinite().all())
