"""Rows that count more or less: the weights themselves, and the solver with them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armor_recipes.errors import NumericalError
from armor_recipes.solver import factorize, relative_loss
from armor_recipes.solver.hessian import hessian_loss
from armor_recipes.solver.normalize import NORM_EPSILON, gradient_row_weights
from tests.support.solver import SEEDS, problem_of


def gradients_of(seed: int, rows: int) -> torch.Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed + 9)) + 0.01


@given(seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_power_one_counts_errors_of_the_weight_by_gradient(seed: int) -> None:
    weight, h = problem_of(seed, 8, 12, dtype=torch.float64)
    g = gradients_of(seed, 8)
    weights, without = gradient_row_weights(weight, g, 1.0)
    approximation = weight + 0.1 * torch.randn(8, 12, generator=torch.Generator().manual_seed(seed)).double()
    columns = weight.norm(dim=0) + NORM_EPSILON
    share = g.double()[:, None] * h / columns.square()
    wanted = float(((weight - approximation).square() * share).sum() / (weight.square() * share).sum())
    assert relative_loss(weight, h, approximation, row_weights=weights) == pytest.approx(wanted, rel=1e-5)
    assert hessian_loss(weight, torch.diag(h), approximation, row_weights=weights) == pytest.approx(wanted, rel=1e-5)
    assert without == 0
    raw, _ = gradient_row_weights(weight, g, 1.0, normalize=False)
    torch.testing.assert_close(raw, g / g.mean())


@pytest.mark.parametrize("normalize", [True, False])
def test_power_zero_leaves_the_loss(normalize: bool) -> None:
    weight, _ = problem_of(0, 8, 12)
    weights, _ = gradient_row_weights(weight, gradients_of(0, 8), 0.0, normalize=normalize)
    assert torch.equal(weights, torch.ones(8))


def test_powers_lie_between() -> None:
    weight, _ = problem_of(1, 8, 12)
    g = gradients_of(1, 8)
    half, whole = (gradient_row_weights(weight, g, power)[0] for power in (0.5, 1.0))
    torch.testing.assert_close(half.square() / half.square().mean(), whole)
    assert float(half.mean()) == pytest.approx(1)


def test_rows_without_a_gradient_are_counted_and_kept_from_zero() -> None:
    weight, _ = problem_of(2, 4, 8)
    weights, without = gradient_row_weights(weight, torch.tensor([1.0, 0.0, 1e-12, 2.0]), 1.0, normalize=False)
    assert without == 1
    torch.testing.assert_close(weights / weights[3], torch.tensor([0.5, 1e-6, 1e-6, 1.0]))
    weights, without = gradient_row_weights(weight, torch.zeros(4), 0.5)
    assert (without, weights.tolist()) == (4, [1.0] * 4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_gradients_that_are_none_are_refused(bad: float) -> None:
    with pytest.raises(NumericalError, match="1 of 4"):
        gradient_row_weights(problem_of(0, 4, 8)[0], torch.tensor([1.0, bad, 1.0, 1.0]), 0.5)


@given(low=st.floats(1e-20, 1e20))
@settings(max_examples=20, deadline=None)
def test_the_unit_of_gradients_does_not_matter(low: float) -> None:
    weight, _ = problem_of(3, 8, 12)
    g = gradients_of(3, 8).double()
    torch.testing.assert_close(
        gradient_row_weights(weight, g * low, 0.5)[0], gradient_row_weights(weight, g, 0.5)[0], rtol=1e-5, atol=0
    )


@pytest.mark.parametrize(("solver", "objective"), [("exact", "diagonal"), ("exact", "hessian"), ("adam", "diagonal")])
def test_solving_lowers_the_weighted_loss(solver: str, objective: str) -> None:
    weight, h = problem_of(4, 16, 16)
    weights = torch.ones(16)
    weights[:4] = 100.0
    gram = torch.diag(h) if objective == "hessian" else None
    found, plain = (
        factorize(weight, h, block_size=4, gram=gram, solver=solver, iterations=30, row_weights=given, seed=0)
        for given in (weights, None)
    )
    assert relative_loss(weight, h, found.dense(), row_weights=weights) == pytest.approx(found.losses[-1], rel=1e-3)
    assert all(late <= early for early, late in zip(found.losses, found.losses[1:], strict=False))
    error, other = (((weight - one.dense()).square() * h).sum(1) for one in (found, plain))
    if solver == "exact":  # rows of one block of A pull on B together: those that count are closer, for others to pay
        assert float(error[:4].sum()) < float(other[:4].sum())
        assert relative_loss(weight, h, found.dense(), row_weights=weights) < relative_loss(
            weight, h, plain.dense(), row_weights=weights
        )


def test_weights_of_one_change_no_bit() -> None:
    weight, h = problem_of(5, 8, 16)
    plain, weighed = (
        factorize(weight, h, block_size=4, iterations=5, row_weights=given, seed=0) for given in (None, torch.ones(8))
    )
    assert torch.equal(plain.dense(), weighed.dense())
    assert plain.losses == weighed.losses


@pytest.mark.parametrize(
    "weights", [torch.ones(7), torch.ones(8, 1), torch.zeros(8), torch.full((8,), float("nan")), -torch.ones(8)]
)
def test_weights_that_fit_no_rows_are_refused(weights: torch.Tensor) -> None:
    weight, h = problem_of(6, 8, 16)
    with pytest.raises(ValueError, match="row_weights must be"):
        factorize(weight, h, block_size=4, iterations=1, row_weights=weights, seed=0)
