"""The `hessian` objective: its steps against brute force and their gradients, its statistics against closed forms."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver import exact, hessian, relative_loss
from armor_recipes.solver.blockdiag import left_multiply, right_multiply
from armor_recipes.solver.entry import nowag_start
from armor_recipes.solver.exact import ExactProblem, Problem, residual, solve_exact
from armor_recipes.solver.hessian import HessianProblem, choose_shrinkage, hessian_loss, matched_weight, regularize
from armor_recipes.solver.normalize import nowag_normalize
from armor_recipes.solver.patterns import Pattern, index_to_mask, magnitude_mask
from armor_recipes.solver.result import Factors
from armor_recipes.solver.sweep import native_available
from tests.support.solver import SEEDS, problem_of, random_factors

Shape = tuple[int, int, tuple[int, int]]
#: The last has blocks of B that groups of four straddle, the one before it one block of each factor.
SHAPES: st.SearchStrategy[Shape] = st.sampled_from(
    [(8, 8, (4, 4)), (16, 24, (8, 8)), (12, 16, (6, 8)), (10, 8, (5, 4)), (8, 16, (8, 16)), (4, 24, (2, 6))]
)
UPDATES = (hessian.update_core, hessian.update_a, hessian.update_b)


@pytest.fixture(autouse=True)
def narrow_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several panels in small matrices."""
    monkeypatch.setattr(hessian, "_PANEL", 8)


def gram_of(seed: int, size: int, *, condition: float = 100.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """A dense Gram matrix with eigenvalues from 1 down to 1 / condition."""
    generator = torch.Generator().manual_seed(seed + 2)
    u = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    gram = (u * torch.logspace(0, -math.log10(condition), size, dtype=torch.float64)) @ u.T
    return ((gram + gram.T) / 2).to(dtype)


def hessian_case(
    seed: int, shape: Shape, *, condition: float = 100.0, dtype: torch.dtype = torch.float64
) -> tuple[HessianProblem, Factors]:
    problem, found = random_factors(seed, *shape)
    factors = Factors(found.a.to(dtype), found.core.to(dtype), found.b.to(dtype), found.index)
    gram = gram_of(seed, shape[1], condition=condition, dtype=dtype)
    return HessianProblem(problem.target.to(dtype), gram, native=False), factors


def exact_loss(problem: HessianProblem, factors: Factors) -> float:
    """tr(E G Eᵀ) of the factors as they are, all in float64."""
    dense = left_multiply(factors.a.double(), right_multiply(factors.core.double(), factors.b.double()))
    error = problem.target.double() - dense
    return float(((error @ problem.gram.double()) * error).sum())


@given(shape=SHAPES, seed=SEEDS)
@settings(max_examples=6, deadline=None)
def test_sweep_solves_each_group_as_brute_force_over_its_masks(shape: Shape, seed: int) -> None:
    problem, factors = hessian_case(seed, shape)
    wanted = brute_force_sweep(problem, factors, width=math.lcm(shape[2][1], 4) * math.ceil(8 / shape[2][1]))
    hessian.update_core(problem, factors)
    torch.testing.assert_close(factors.core, wanted, rtol=1e-6, atol=1e-8)
    assert torch.equal(index_to_mask(factors.index), factors.core != 0)


def brute_force_sweep(problem: HessianProblem, factors: Factors, *, width: int) -> Tensor:
    """S after a sweep, each group by least squares on every mask in the metric of G; panels of `width` columns."""
    root = torch.linalg.cholesky(problem.gram)
    a, b = torch.block_diag(*factors.a), torch.block_diag(*factors.b) @ root
    target, core = problem.target @ root, factors.core.clone()
    for panel in range(0, core.shape[1], width):
        for row in range(core.shape[0]):
            for group in range(panel, min(panel + width, core.shape[1]), 4):
                core[row, group : group + 4] = 0
                error = (target - a @ core @ b).flatten()[:, None]
                basis = torch.stack([torch.outer(a[:, row], b[group + i]).flatten() for i in range(4)], dim=1)
                core[row, group : group + 4] = best_values(basis, error)
    return core


def best_values(basis: Tensor, error: Tensor) -> Tensor:
    """The four values of a group, two of them zero, that leave the least of the error."""
    offers = []
    for kept in map(list, combinations(range(4), 2)):
        values = torch.linalg.lstsq(basis[:, kept], error).solution
        offers.append((float((error - basis[:, kept] @ values).square().sum()), kept, values[:, 0]))
    _, kept, values = min(offers, key=lambda offer: offer[0])
    return torch.zeros(4, dtype=basis.dtype).index_copy(0, torch.tensor(kept), values)


@pytest.mark.parametrize(
    ("dtype", "condition", "floor"),
    [
        (torch.float64, 1e2, 1e-14),
        (torch.float64, 1e8, 1e-14),
        (torch.float32, 1e2, 1e-7),
        (torch.float32, 1e4, 1e-6),
        (torch.float32, 1e8, 3e-4),
    ],
)
@given(shape=SHAPES, seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_no_step_raises_the_loss(dtype: torch.dtype, condition: float, floor: float, shape: Shape, seed: int) -> None:
    """Up to rounding, `floor` of the loss of Ŵ = 0.

    In directions that G hardly weighs E stays large while the loss vanishes: there float32 cannot tell one mask from another.
    """
    problem, factors = hessian_case(seed, shape, condition=condition, dtype=dtype)
    floor *= exact_loss(problem, Factors(factors.a, 0 * factors.core, factors.b, factors.index))
    loss = exact_loss(problem, factors)
    for update in (*UPDATES, *reversed(UPDATES)):
        update(problem, factors)
        after = exact_loss(problem, factors)
        assert after <= loss * (1 + (1e-12 if dtype == torch.float64 else 1e-5)) + floor
        loss = after
    assert not problem.counts or (dtype == torch.float32 and condition == 1e8)


@given(shape=SHAPES, seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_a_update_is_the_minimiser(shape: Shape, seed: int) -> None:
    """Its gradient is that of the ridge, 1e-6 of the mean diagonal of T_j G T_jᵀ."""
    problem, factors = hessian_case(seed, shape)
    before = factors.a.clone()
    hessian.update_a(problem, factors)
    t, size = factors.core @ torch.block_diag(*factors.b), shape[2][0]
    error = problem.target - torch.block_diag(*factors.a) @ t
    for j, block in enumerate(factors.a):
        rows = slice(j * size, (j + 1) * size)
        ridge = 1e-6 * (t[rows] @ problem.gram * t[rows]).sum() / size
        torch.testing.assert_close(
            error[rows] @ problem.gram @ t[rows].T, ridge * (block - before[j]), rtol=1e-6, atol=1e-9
        )


@given(shape=SHAPES, seed=SEEDS)
@settings(max_examples=20, deadline=None)
def test_each_b_step_is_the_minimiser(shape: Shape, seed: int) -> None:
    """Block after block: the gradient before it is what the step takes away, both Gram matrices with their ridge."""
    problem, factors = hessian_case(seed, shape)
    before = factors.b.clone()
    hessian.update_b(problem, factors)
    u, (count, size, _) = torch.block_diag(*factors.a) @ factors.core, before.shape
    for k in range(count):
        columns = slice(k * size, (k + 1) * size)
        mixed = torch.block_diag(*factors.b[:k], *before[k:])
        gradient = u[:, columns].T @ ((problem.target - u @ mixed) @ problem.gram)[:, columns]
        left, right = u[:, columns].T @ u[:, columns], problem.gram[columns, columns]
        eye = 1e-6 * torch.eye(size, dtype=u.dtype)
        left, right = left + left.diagonal().mean() * eye, right + right.diagonal().mean() * eye
        torch.testing.assert_close(left @ (factors.b[k] - before[k]) @ right, gradient, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["cycle", "update_core", "update_a", "update_b"])
@given(shape=SHAPES, seed=SEEDS)
@settings(max_examples=10, deadline=None)
def test_with_a_diagonal_gram_it_is_the_diagonal_objective(name: str, shape: Shape, seed: int) -> None:
    scaled, factors = random_factors(seed, *shape)
    root = problem_of(seed, shape[0], shape[1], dtype=torch.float64)[1].sqrt()
    problem = HessianProblem(scaled.target / root, torch.diag(root.square()), native=False)
    ours = Factors(factors.a, factors.core, factors.b / root.view(len(factors.b), 1, -1), factors.index)
    if name == "cycle":
        problem.cycle(ours), scaled.cycle(factors)
    else:
        getattr(hessian, name)(problem, ours), getattr(exact, name)(scaled, factors)
    assert problem.squared_error(ours) == pytest.approx(
        scaled.squared_error(factors), rel=1e-4, abs=1e-6 * float(scaled.target.square().sum())
    )
    assert torch.equal(ours.index, factors.index)
    torch.testing.assert_close(ours.b * root.view(len(ours.b), 1, -1), factors.b, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.a, factors.a, rtol=1e-3, atol=1e-4)


def started(
    seed: int, d_out: int, d_in: int, block: int, *, native: bool | None = None
) -> tuple[HessianProblem, Factors]:
    """A float32 problem at NoWag-P."""
    weight = nowag_normalize(problem_of(seed, d_out, d_in)[0]).weight
    gram, _ = regularize(gram_of(seed, d_in, dtype=torch.float32), shrinkage=0.1, damping=0.01)
    mask = magnitude_mask(weight.square() * gram.diagonal())
    return HessianProblem(weight, gram, native=native), nowag_start(weight, mask, (block, block))


def test_the_common_loop_runs_it_and_returns_the_best_state() -> None:
    problem, start = started(3, 32, 48, 8)
    losses: list[float] = []
    first = problem.squared_error(start)
    found, _ = solve_exact(problem, start, iterations=40, tolerance=0.0, record=losses.append)
    assert all(late <= early for early, late in zip([first, *losses], losses, strict=False))
    assert losses[-1] < 0.5 * first
    assert problem.squared_error(found) == losses[-1]
    assert exact_loss(problem, found) == pytest.approx(losses[-1], rel=1e-4)


def test_it_lowers_its_own_loss_further_than_the_diagonal_objective_does() -> None:
    """Over four weights: masks are a local optimum, and one run alone can end either way."""
    totals = torch.zeros(2, dtype=torch.float64)
    for seed in range(4):
        problem, start = started(seed, 32, 48, 8)
        root = problem.gram.diagonal().sqrt().view(-1, 1, 8)
        scaled = Factors(start.a, start.core, start.b * root, start.index)
        ours = solved(problem, start)
        other = solved(ExactProblem(problem.target * root.flatten()), scaled)
        other = Factors(other.a, other.core, other.b / root, other.index)
        totals += torch.tensor([problem.squared_error(ours), problem.squared_error(other)])
    assert totals[0] < 0.85 * totals[1]


def solved(problem: Problem, start: Factors) -> Factors:
    return solve_exact(problem, start, iterations=40, tolerance=0.0, record=lambda _: None)[0]


def test_a_fixed_mask_stays() -> None:
    problem, start = started(5, 16, 24, 8)
    problem.fixed_mask = True
    found = problem.cycle(problem.cycle(start.clone()))
    assert torch.equal(found.index, start.index)
    assert not found.core[~index_to_mask(start.index)].any()
    assert problem.squared_error(found) < 0.9 * problem.squared_error(start)


def test_other_patterns_are_kept() -> None:
    weight, _ = problem_of(6, 8, 32)
    pattern = Pattern(4, 8)
    start = nowag_start(weight, magnitude_mask(weight.square(), pattern), (4, 4), pattern)
    problem = HessianProblem(weight, gram_of(6, 32, dtype=torch.float32), pattern=pattern)
    found = problem.cycle(start.clone())
    assert ((found.core != 0).unflatten(1, (-1, 8)).sum(-1) == 4).all()
    assert problem.squared_error(found) < 0.7 * problem.squared_error(start)


@pytest.mark.skipif(not native_available(), reason="the compiled sweep was not built")
def test_compiled_and_torch_sweeps_agree() -> None:
    results = []
    for native in (True, False):
        problem, factors = started(7, 32, 64, 16, native=native)
        hessian.update_core(problem, factors)
        results.append(factors)
    assert torch.equal(results[0].index, results[1].index)
    torch.testing.assert_close(results[0].core, results[1].core, rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not native_available(), reason="the compiled sweep was not built")
def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian, "_PANEL", 192)
    problem, start = started(8, 384, 576, 64)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            factors = problem.cycle(start.clone())
            found.append((factors, problem.squared_error(factors)))
    finally:
        torch.set_num_threads(before)
    assert found[0][1] == found[1][1]
    for name in ("a", "core", "b", "index"):
        assert torch.equal(getattr(found[0][0], name), getattr(found[1][0], name))


def test_columns_never_kept_and_rows_of_zeros_do_not_change_their_factors() -> None:
    problem, factors = hessian_case(9, (8, 16, (8, 8)))
    factors.core[:, 1] = 0
    factors.core[5] = 0
    before = factors.clone()
    hessian.update_b(problem, factors)
    assert torch.equal(factors.b[0, 1], before.b[0, 1])
    hessian.update_a(problem, factors)
    assert torch.equal(factors.a[0, :, 5], before.a[0, :, 5])
    assert not torch.equal(factors.a[0, :, 4], before.a[0, :, 4])


def test_an_infinite_weight_is_a_typed_error() -> None:
    problem, start = started(10, 8, 8, 4)
    problem.target[0, 0] = float("inf")
    with pytest.raises(NumericalError, match="became"):
        problem.squared_error(start)


def test_regularize_by_hand() -> None:
    gram = torch.tensor([[2.0, 1.0, 0.0], [1.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    found, dead = regularize(gram, shrinkage=0.25, damping=0.5)
    wanted = torch.tensor([[3.5, 0.75, 0.0], [0.75, 5.5, 0.0], [0.0, 0.0, 4.5]]) / 4.5
    torch.testing.assert_close(found, wanted)
    assert dead == 1
    assert gram[2, 2] == 0


@given(seed=SEEDS, shrinkage=st.floats(0, 1), scale=st.sampled_from([1e-12, 1.0, 1e12]))
@settings(max_examples=20, deadline=None)
def test_regularize_gives_mean_one_whatever_the_scale(seed: int, shrinkage: float, scale: float) -> None:
    gram = gram_of(seed, 12, dtype=torch.float32)
    found, _ = regularize(gram * scale, shrinkage=shrinkage, damping=0.01)
    assert float(found.diagonal().mean()) == pytest.approx(1, rel=1e-5)
    torch.testing.assert_close(found, regularize(gram, shrinkage=shrinkage, damping=0.01)[0], rtol=1e-4, atol=1e-6)
    assert torch.linalg.eigvalsh(found.double()).min() > 0.005


@pytest.mark.parametrize(("shrinkage", "damping"), [(-0.1, 0), (1.1, 0), (math.nan, 0), (0, -1), (0, math.inf)])
def test_regularize_refuses_numbers_out_of_range(shrinkage: float, damping: float) -> None:
    with pytest.raises(ValueError, match="must lie in"):
        regularize(torch.eye(4), shrinkage=shrinkage, damping=damping)


def test_inputs_that_are_always_zero_weigh_alike() -> None:
    regular, dead = regularize(torch.zeros(4, 4), shrinkage=0.5, damping=0.01)
    assert torch.equal(regular, torch.eye(4))
    assert dead == 4


@pytest.mark.parametrize(
    ("gram", "error", "match"),
    [
        (torch.ones(2, 3), ValueError, r"must be \(I, I\), got \(2, 3\)"),
        (torch.tensor([[1.0, 2.0], [3.0, 4.0]]), ValueError, "not exactly symmetric"),
        (torch.tensor([[1.0, math.nan], [math.nan, 1.0]]), NumericalError, "2 of 4 entries"),
        (-torch.eye(2), NumericalError, "negative"),
    ],
)
def test_gram_matrices_that_cannot_be_used(gram: Tensor, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        regularize(gram, shrinkage=0.0, damping=0.01)
    good = torch.eye(gram.shape[1])
    if error is ValueError and gram.shape != good.shape:
        match = "one shape"
    with pytest.raises(error, match=match):
        choose_shrinkage([(good, gram)])


@given(seed=SEEDS)
@example(seed=0)
@settings(max_examples=20, deadline=None)
def test_chosen_shrinkage_is_the_best_of_a_grid(seed: int) -> None:
    fit, held_out = (sample_gram(seed + i, tokens) for i, tokens in ((0, 20), (1, 200)))
    scale = fit.diagonal().rsqrt()
    r, other = (x * scale[:, None] * scale for x in (fit, held_out))
    off = ~torch.eye(len(r), dtype=torch.bool)
    grid = torch.linspace(0, 1, 1001, dtype=torch.float64)
    costs = torch.stack([((1 - g) * r - other)[off].square().sum() for g in grid])
    assert choose_shrinkage([(fit, held_out)]) == pytest.approx(float(grid[costs.argmin()]), abs=1e-3)


def sample_gram(seed: int, tokens: int) -> Tensor:
    """H of a few tokens of correlated inputs whose channels differ in scale."""
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x = (x + 0.3 * x[:, :1]) * torch.logspace(-2, 1, 16, dtype=torch.float64)
    return (x.T @ x / tokens + (x.T @ x / tokens).T) / 2


def test_chosen_shrinkage_at_its_ends() -> None:
    gram = sample_gram(0, 30)
    assert choose_shrinkage([(gram, gram)]) == pytest.approx(0, abs=1e-12)
    assert choose_shrinkage([(gram, torch.diag(gram.diagonal()))]) == 1
    assert choose_shrinkage([(gram, 2 * torch.diag(gram.diagonal()) - gram)]) == 1
    assert choose_shrinkage([(torch.diag(gram.diagonal()), gram)]) == 1
    dead = gram.index_fill(0, torch.tensor(3), 0).index_fill(1, torch.tensor(3), 0)
    assert choose_shrinkage([(dead, dead)]) == pytest.approx(0, abs=1e-12)


def test_splits_count_together() -> None:
    """By the squares of all: the best λ of both lies between those of each."""
    splits = [(sample_gram(seed, 20), sample_gram(seed + 1, tokens)) for seed, tokens in ((0, 30), (5, 300))]
    first, second = (choose_shrinkage([split]) for split in splits)
    assert choose_shrinkage(splits) == pytest.approx(choose_shrinkage(reversed(splits)))
    assert min(first, second) < choose_shrinkage(splits) < max(first, second)
    assert choose_shrinkage([splits[0], splits[0]]) == pytest.approx(first)


def test_fewer_tokens_are_shrunk_more() -> None:
    held_out = sample_gram(100, 4000)
    found = [
        sum(choose_shrinkage([(sample_gram(seed, tokens), held_out)]) for seed in range(20)) / 20
        for tokens in (20, 80, 320)
    ]
    assert found[0] > found[1] > found[2] > 0


def test_loss_is_the_output_error_of_the_normalised_weight() -> None:
    weight, h = problem_of(12, 8, 16)
    x = torch.randn(16, 50, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    approximation = weight + 0.1 * torch.randn(8, 16, generator=torch.Generator().manual_seed(4))
    normal = nowag_normalize(weight.double())
    error = (weight.double() - approximation.double()) / normal.columns / normal.rows[:, None]
    wanted = float((error @ x).square().sum() / (normal.weight @ x).square().sum())
    assert hessian_loss(weight, x @ x.T, approximation) == pytest.approx(wanted, rel=1e-9)
    assert hessian_loss(weight, torch.diag(h), approximation) == pytest.approx(
        relative_loss(weight, h, approximation), rel=1e-9
    )
    assert hessian_loss(weight, x @ x.T, weight) == pytest.approx(0, abs=1e-12)
    assert hessian_loss(weight, x @ x.T, torch.zeros_like(weight)) == 1


def test_residual_of_either_problem_is_the_same() -> None:
    problem, factors = hessian_case(13, (8, 8, (4, 4)))
    assert torch.equal(residual(problem, factors), residual(ExactProblem(problem.target), factors))


def test_matching_needs_a_positive_definite_gram_matrix() -> None:
    singular = torch.ones(3, 3)
    with pytest.raises(NumericalError, match=r"1 of 1 \(3x3, mean diagonal 1\) .*raise `damping` or `shrinkage`"):
        matched_weight(torch.eye(3), singular, singular, singular)
