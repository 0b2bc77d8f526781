"""Weights and statistics that numerics fail on: each has a finite result that is no worse than the start, or a typed error."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from armor_recipes.errors import NumericalError
from armor_recipes.solver import factorize
from armor_recipes.solver.exact import solve_normal, squared_error, update_a, update_b
from armor_recipes.solver.patterns import mask_to_index
from tests.support.solver import problem_of, random_factors

KINDS = {
    "zero rows": lambda w, h: (w.index_fill(0, torch.arange(3, 9), 0), h),
    "zero columns": lambda w, h: (w.index_fill(1, torch.arange(4, 12), 0), h),
    "zero weight": lambda w, h: (w * 0, h),
    "dead channels": lambda w, h: (w, h.index_fill(0, torch.arange(2, 11), 0)),
    "a column that is never kept": lambda w, h: (torch.cat((w[:, :5], w[:, 5:6] * 1e-7, w[:, 6:]), 1), h),
    "equal columns": lambda w, h: (w[:, ::2].repeat_interleave(2, 1), h),
    "rank one": lambda w, h: (w[:, :1] @ w[:1], h),
    "condition 1e12": lambda w, h: (conditioned(w, 1e-12), h),
    "an outlier of 1e4": lambda w, h: (w.index_put((torch.tensor(2), torch.tensor(5)), torch.tensor(1e4)), h),
    "rows of 1e4": lambda w, h: (w.index_fill(0, torch.tensor([7]), 1e4), h),
    "a channel of 1e4": lambda w, h: (w, h.index_fill(0, torch.tensor(7), 1e4)),
    "bfloat16": lambda w, h: (w.bfloat16(), h),
    "weights of 1e15": lambda w, h: (w * 1e15, h),
    "weights of 1e-15": lambda w, h: (w * 1e-15, h),
    "moments of 1e15": lambda w, h: (w, h * 1e15),
    "moments of 1e-15": lambda w, h: (w, h * 1e-15),
    "moments from 1e-15 to 1e15": lambda w, h: (w, torch.logspace(-15, 15, len(h))),
    "columns from 1e-15 to 1e15": lambda w, h: (w * torch.logspace(-15, 15, len(h)), h),
    "rows from 1e-15 to 1e15": lambda w, h: (w * torch.logspace(-15, 15, len(w))[:, None], h),
}


def conditioned(weight: torch.Tensor, smallest: float) -> torch.Tensor:
    """The weight with singular values from 1 down to `smallest`."""
    u, s, v = torch.linalg.svd(weight.double())
    return (u * torch.logspace(0, torch.tensor(smallest).log10().item(), len(s), dtype=torch.float64) @ v).float()


@pytest.mark.parametrize(
    ("solver", "pattern", "block_size"),
    [("exact", "2:4", 8), ("exact", "2:4", 16), ("exact", "4:8", 16), ("exact", "8:16", 16), ("adam", "2:4", 8)],
)
@pytest.mark.parametrize("kind", KINDS)
def test_awkward_weights_have_a_defined_outcome(kind: str, block_size: int, pattern: str, solver: str) -> None:
    """Block size 16 makes one block of each factor."""
    weight, h = KINDS[kind](*problem_of(29, 16, 16))
    found = factorize(weight, h, block_size=block_size, pattern=pattern, solver=solver, iterations=6, seed=0)
    assert torch.isfinite(found.dense()).all()
    assert found.losses[-1] <= found.losses[0] * (1 + 1e-5)
    assert set(found.counts) <= {"dead_channels", "gram_jitter"}
    if solver == "exact":
        assert found.losses[-1] <= max(0.7 * found.losses[0], 1e-9)
    assert found.counts.get("dead_channels", 0) == (9 if kind == "dead channels" else 0)


@pytest.mark.parametrize("scale", [1e30, 1e38])
def test_weights_whose_norms_overflow_are_a_typed_error(scale: float) -> None:
    weight, h = problem_of(29, 16, 16)
    with pytest.raises(NumericalError, match=r"2-norms beyond the range of torch\.float32"):
        factorize(weight / weight.abs().max() * scale, h, block_size=8, iterations=1, seed=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("smallest", [1e-6, 1e-12, 0.0])
def test_ill_conditioned_factors_never_raise_the_loss(smallest: float, dtype: torch.dtype) -> None:
    """A and B with singular values down to 1e-6 or less make Gram matrices of condition 1e12 and more."""
    problem, factors = random_factors(33, 16, 16, (8, 8))
    spectrum = torch.logspace(0, -6, 8, dtype=torch.float64) if smallest else torch.ones(8, dtype=torch.float64)
    spectrum[-1] = smallest
    problem.target = problem.target.to(dtype)
    for name in ("a", "b"):
        u, _, v = torch.linalg.svd(getattr(factors, name))
        setattr(factors, name, (u * spectrum @ v).to(dtype))
    factors.core = factors.core.to(dtype)
    loss = squared_error(problem, factors)
    for update in (update_b, update_a, update_b, update_a):
        update(problem, factors)
        after = squared_error(problem, factors)
        assert after <= loss * (1 + (1e-12 if dtype == torch.float64 else 1e-5))
        loss = after
    assert not problem.counts


def test_columns_never_kept_and_rows_of_zeros_do_not_change_their_factors() -> None:
    problem, factors = random_factors(35, 8, 8, (8, 8))
    mask = torch.tensor([True, False, False, True]).repeat(8, 2)
    factors.core, factors.index = problem.target * mask, mask_to_index(mask)
    factors.core[5] = 0
    before = factors.clone()
    update_b(problem, factors)
    changed = (factors.b != before.b)[0].any(1)
    assert torch.equal(changed, mask[0])
    update_a(problem, factors)
    changed = (factors.a != before.a)[0].any(0)
    assert changed.tolist() == [True, True, True, True, True, False, True, True]


def test_normal_equations_count_their_jitter_and_give_up_with_a_typed_error() -> None:
    counts: Counter[str] = Counter()
    good = torch.eye(3)[None].repeat(2, 1, 1)
    torch.testing.assert_close(solve_normal(2 * good, good, counts), good / (2 + 2e-6))
    assert not counts
    slightly = torch.diag(torch.tensor([1.0, 1.0, -3e-6]))[None]
    solve_normal(slightly, good[:1], counts)
    assert counts["gram_jitter"] == 1
    with pytest.raises(NumericalError, match="not positive definite"):
        solve_normal(torch.diag(torch.tensor([1.0, 1.0, -1.0]))[None], good[:1], counts)


def test_normal_equations_of_condition_1e12_are_solved_to_their_ridge() -> None:
    u = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)).Q
    gram = (u * torch.logspace(0, -12, 12, dtype=torch.float64) @ u.T)[None]
    wanted = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ridge = 1e-6 * gram[0].diagonal().mean()
    rhs = gram @ wanted + ridge * wanted
    counts: Counter[str] = Counter()
    torch.testing.assert_close(solve_normal(gram, rhs, counts), wanted, rtol=1e-6, atol=1e-6)
    assert not counts
