"""The solver's promises, checked against brute force, closed forms and planted solutions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armor_recipes.errors import NumericalError
from armor_recipes.solver import StopReason, factorize, nowag_mask, relative_loss
from armor_recipes.solver.blockdiag import apply_input_factor, apply_output_factor, fold
from armor_recipes.solver.exact import (
    ExactProblem,
    cycle,
    squared_error,
    update_a,
    update_b,
    update_core,
)
from armor_recipes.solver.normalize import fill_dead_channels, nowag_normalize
from armor_recipes.solver.patterns import index_to_mask, magnitude_mask, mask_to_index
from armor_recipes.solver.result import Factors
from armor_recipes.solver.sweep import native_available
from tests.support.solver import SEEDS, problem_of, random_factors

SHAPES = st.sampled_from([(8, 8, (4, 4)), (16, 24, (8, 8)), (12, 16, (6, 8)), (8, 32, (8, 16)), (10, 8, (5, 4))])


def test_block_diagonal_products_by_hand() -> None:
    a = torch.tensor([[[2.0]], [[3.0]]])
    b = torch.tensor([[[1.0, 1.0, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 5.0]]])
    core = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 2.0, 1.0, 0.0]])
    assert fold(a, core, b).tolist() == [[2.0, 2.0, 0.0, 10.0], [0.0, 6.0, 3.0, 0.0]]
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert apply_input_factor(x, b).tolist() == [3.0, 2.0, 3.0, 20.0]
    assert apply_output_factor(torch.tensor([1.0, 1.0]), a).tolist() == [2.0, 3.0]


@given(shape=SHAPES, seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_fold_equals_running_the_factors(shape: tuple[int, int, tuple[int, int]], seed: int) -> None:
    d_out, d_in, sizes = shape
    _, factors = random_factors(seed, d_out, d_in, sizes)
    x = torch.randn(3, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    through = apply_output_factor(apply_input_factor(x, factors.b) @ factors.core.T, factors.a)
    torch.testing.assert_close(
        through.float(), x.float() @ fold(factors.a, factors.core, factors.b).T, rtol=1e-4, atol=1e-4
    )


def test_magnitude_mask_keeps_two_and_breaks_ties_to_the_lower_index() -> None:
    scores = torch.tensor([[1.0, 1.0, 1.0, 1.0, 0.0, 3.0, 3.0, 5.0]])
    assert magnitude_mask(scores).int().tolist() == [[1, 1, 0, 0, 0, 1, 0, 1]]


@given(index=st.lists(st.integers(0, 5), min_size=1, max_size=40))
def test_mask_index_round_trip(index: list[int]) -> None:
    tensor = torch.tensor([index], dtype=torch.uint8)
    assert torch.equal(mask_to_index(index_to_mask(tensor)), tensor)


def test_mask_that_is_not_2of4_is_refused() -> None:
    with pytest.raises(ValueError, match="exactly 2"):
        mask_to_index(torch.tensor([[True, True, True, False]]))


def test_nowag_normalisation_undoes_itself() -> None:
    weight, _ = problem_of(0, 6, 8)
    normal = nowag_normalize(weight)
    torch.testing.assert_close(normal.rows[:, None] * normal.weight * normal.columns, weight)
    assert torch.linalg.vector_norm(normal.weight, dim=1).allclose(torch.ones(6), atol=1e-3)


def test_iteration_zero_is_nowag_p() -> None:
    weight, h = problem_of(3, 16, 24)
    found = factorize(weight, h, block_size=8, iterations=0, seed=0)
    mask, counts = nowag_mask(weight, h)
    assert torch.equal(found.mask, mask)
    assert counts == {}
    torch.testing.assert_close(found.dense(), weight * mask)
    assert found.losses == pytest.approx([relative_loss(weight, h, weight * mask)])


@pytest.mark.parametrize("solver", ["exact", "adam"])
@given(shape=SHAPES, seed=SEEDS)
@settings(max_examples=15, deadline=None)
def test_result_is_2of4_monotone_and_measured_true(
    solver: str, shape: tuple[int, int, tuple[int, int]], seed: int
) -> None:
    d_out, d_in, sizes = shape
    weight, h = problem_of(seed, d_out, d_in)
    found = factorize(weight, h, block_size=sizes, solver=solver, iterations=12, seed=seed)
    assert (found.mask.view(d_out, -1, 4).sum(-1) == 2).all()
    assert not found.core[~found.mask].any()
    assert all(late <= early for early, late in zip(found.losses, found.losses[1:], strict=False))
    assert len(found.losses) == len(found.seconds)
    assert relative_loss(weight, h, found.dense()) == pytest.approx(found.losses[-1], rel=1e-3, abs=1e-6)
    assert found.a.shape == (d_out // sizes[0], sizes[0], sizes[0])
    assert found.b.shape == (d_in // sizes[1], sizes[1], sizes[1])


@given(shape=SHAPES, seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_a_and_b_updates_are_the_minimisers(shape: tuple[int, int, tuple[int, int]], seed: int) -> None:
    """Each step minimises ‖E‖² + ε‖step‖²: its gradient is zero, whatever the conditioning; ε is 1e-6 of the mean diagonal."""
    problem, factors = random_factors(seed, shape[0], shape[1], shape[2])
    b_o, b_i = shape[2]
    before = factors.clone()
    update_a(problem, factors)
    t = torch.cat([factors.core[:, k * b_i : (k + 1) * b_i] @ block for k, block in enumerate(factors.b)], dim=1)
    for j, block in enumerate(factors.a):
        rows = slice(j * b_o, (j + 1) * b_o)
        ridge = 1e-6 * t[rows].square().sum() / b_o
        gradient = (problem.target[rows] - block @ t[rows]) @ t[rows].T
        torch.testing.assert_close(gradient, ridge * (block - before.a[j]), rtol=1e-6, atol=1e-9)
    update_b(problem, factors)
    u = torch.cat([block @ factors.core[j * b_o : (j + 1) * b_o] for j, block in enumerate(factors.a)])
    for k, block in enumerate(factors.b):
        columns = slice(k * b_i, (k + 1) * b_i)
        ridge = 1e-6 * u[:, columns].square().sum() / b_i
        gradient = u[:, columns].T @ (problem.target[:, columns] - u[:, columns] @ block)
        torch.testing.assert_close(gradient, ridge * (block - before.b[k]), rtol=1e-6, atol=1e-9)


def test_sweeps_on_4x4_never_beat_the_best_of_all_masks(
    capsys: pytest.CaptureFixture[str], record_property: Callable[[str, object], None]
) -> None:
    """With A and B fixed: 6^4 = 1,296 masks, each solved by least squares; the distance of the sweeps is reported."""
    ratios = []
    for seed in range(3):
        problem, factors = random_factors(seed, 4, 4, (4, 4))
        best = min(mask_loss(problem, factors, code) for code in range(6**4))
        for _ in range(50):
            update_core(problem, factors)
        ratios.append(squared_error(problem, factors) / best)
    record_property("loss after sweeps / best of 1,296 masks", ratios)
    with capsys.disabled():
        print(f"\n4x4, A and B fixed: loss after sweeps / best of 1,296 masks = {[round(r, 4) for r in ratios]}")
    assert all(1 - 1e-9 <= ratio < 1.5 for ratio in ratios)


def mask_loss(problem: ExactProblem, factors: Factors, code: int) -> float:
    kept = [(row, c) for row in range(4) for c in list(combinations(range(4), 2))[code // 6**row % 6]]
    basis = torch.stack([torch.outer(factors.a[0][:, r], factors.b[0][c]).flatten() for r, c in kept], dim=1)
    target = problem.target.flatten()[:, None]
    solution = torch.linalg.lstsq(basis, target).solution
    return float((target - basis @ solution).square().sum())


@pytest.mark.skipif(not native_available(), reason="the compiled sweep was not built")
def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    weight, h = problem_of(5, 576, 384)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(factorize(weight, h, block_size=64, iterations=4, seed=0))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].core, found[1].core)
    assert torch.equal(found[0].a, found[1].a)
    assert found[0].losses == found[1].losses


@pytest.mark.parametrize("solver", ["exact", "adam"])
def test_a_given_mask_stays_fixed(solver: str) -> None:
    weight, h = problem_of(7, 16, 16)
    mask = torch.tensor([True, False, False, True]).repeat(16, 4)
    found = factorize(weight, h, block_size=8, solver=solver, iterations=20, mask=mask, seed=0)
    assert torch.equal(found.mask, mask)
    assert found.losses[-1] < found.losses[0]


def test_planted_factors_are_recovered_with_the_true_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    size, b = 64, 8
    near_eye = lambda n: torch.eye(b) + torch.randn(n, b, b, generator=generator) * 0.3 / b**0.5  # noqa: E731
    scores = torch.rand(size, size, generator=generator)
    mask = magnitude_mask(scores)
    core = torch.randn(size, size, generator=generator) * mask
    weight = fold(near_eye(size // b), core, near_eye(size // b))
    found = factorize(weight, torch.ones(size), block_size=b, iterations=300, mask=mask, seed=0)
    assert (weight - found.dense()).norm() / weight.norm() < 1e-3


@pytest.mark.parametrize("side", ["rows", "columns"])
def test_permuting_blocks_permutes_the_result(side: str) -> None:
    """Blocks of rows, or of columns with their h, are independent but for the order of sums."""
    weight, h = problem_of(11, 32, 32)
    order = torch.arange(32).view(4, 8)[[2, 0, 3, 1]].flatten()
    permuted = (weight[order], h) if side == "rows" else (weight[:, order], h[order])
    first = factorize(weight, h, block_size=8, iterations=4, seed=0).dense()
    second = factorize(*permuted, block_size=8, iterations=4, seed=0).dense()
    wanted = first[order] if side == "rows" else first[:, order]
    assert (wanted - first).norm() > 0.5 * first.norm()
    torch.testing.assert_close(second, wanted, rtol=1e-3, atol=1e-4)


def test_a_row_block_is_solved_as_if_alone() -> None:
    """With B fixed (one cycle's A update), row blocks do not see each other."""
    problem, factors = random_factors(13, 16, 8, (8, 8))
    update_core(problem, factors)
    alone, single = random_factors(13, 16, 8, (8, 8))
    half = ExactProblem(alone.target[8:], native=False)
    part = Factors(single.a[1:], single.core[8:], single.b, single.index[8:])
    update_core(half, part)
    torch.testing.assert_close(part.core, factors.core[8:])


def test_exact_is_deterministic_and_leaves_the_global_generator_alone() -> None:
    weight, h = problem_of(17, 32, 32)
    state = torch.get_rng_state()
    for solver in ("exact", "adam"):
        first = factorize(weight, h, block_size=8, solver=solver, iterations=10, seed=3)
        second = factorize(weight, h, block_size=8, solver=solver, iterations=10, seed=3)
        assert torch.equal(first.dense(), second.dense())
    assert torch.equal(torch.get_rng_state(), state)


def test_tolerance_stops_early_and_zero_never_does() -> None:
    weight, h = problem_of(19, 64, 64)
    loose = factorize(weight, h, block_size=4, iterations=200, tolerance=0.05, seed=0)
    assert loose.stop_reason is StopReason.TOLERANCE
    assert len(loose.losses) < 201
    never = factorize(weight, h, block_size=4, iterations=60, tolerance=0.0, seed=0)
    assert never.stop_reason is StopReason.ITERATIONS
    assert len(never.losses) == 61


def test_dead_channels_are_filled_with_the_mean_of_the_others_and_counted() -> None:
    filled, count = fill_dead_channels(torch.tensor([0.0, 2.0, 4.0, 0.0]))
    assert filled.tolist() == [3.0, 2.0, 4.0, 3.0]
    assert count == 2
    weight, h = problem_of(23, 8, 8)
    h[2] = 0
    assert factorize(weight, h, block_size=4, iterations=2, seed=0).counts["dead_channels"] == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda w, h: w[0].fill_(float("nan")), "weights are not finite"),
        (lambda w, h: h[0].fill_(float("inf")), "not finite"),
        (lambda w, h: h[1].fill_(-1.0), "negative"),
    ],
)
def test_values_that_cannot_be_solved_are_errors(spoil, message) -> None:  # type: ignore[no-untyped-def]
    weight, h = problem_of(0, 8, 8)
    spoil(weight, h)
    with pytest.raises(NumericalError, match=message):
        factorize(weight, h, block_size=4, iterations=1, seed=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 3}, "does not divide"),
        ({"block_size": (4, 3)}, "b_i=3 does not divide d_in=8"),
        ({"block_size": 4, "solver": "sgd"}, "solver='sgd'"),
        ({"block_size": 4, "pattern": "2-4"}, "pattern='2-4' is not of the form N:M"),
        ({"block_size": 4, "pattern": "4:4"}, "pattern 4:4 must keep N of every M entries with 1 <= N < M <= 32"),
        ({"block_size": 4, "pattern": "0:4"}, "pattern 0:4 must"),
        ({"block_size": 4, "pattern": "2:33"}, "pattern 2:33 must"),
        ({"block_size": 4, "pattern": "2:6"}, "pattern 2:6 needs a multiple of 6 columns, and d_in=8"),
        ({"block_size": 2, "solver": "adam"}, "needs block_size b_i=2 to be a multiple of 4 with pattern 2:4"),
        ({"block_size": 4, "gram": torch.eye(3)}, "gram must be"),
        ({"block_size": 4, "gram": torch.eye(8), "solver": "adam"}, "gram must be"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    weight, h = problem_of(0, 8, 8)
    with pytest.raises(ValueError, match=message):
        factorize(weight, h, iterations=1, seed=0, **arguments)  # type: ignore[arg-type]


def test_a_cycle_lowers_a_loss_that_can_be_lowered() -> None:
    problem, factors = random_factors(31, 16, 24, (8, 8))
    before = squared_error(problem, factors)
    assert squared_error(problem, cycle(problem, factors)) < 0.9 * before


def test_progress_is_reported_for_every_iteration() -> None:
    weight, h = problem_of(37, 8, 8)
    seen: list[tuple[int, int, float]] = []
    found = factorize(weight, h, block_size=4, iterations=5, seed=0, on_progress=lambda *event: seen.append(event))
    assert [event[0] for event in seen] == [1, 2, 3, 4, 5]
    assert [event[2] for event in seen] == list(found.losses[1:])
