"""N:M patterns: numbering, exact group updates against brute force, sweeps in both forms, groups that straddle blocks."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from math import comb

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armor_recipes.solver import factorize, nowag_mask, relative_loss
from armor_recipes.solver.exact import residual, squared_error, update_a, update_b, update_core
from armor_recipes.solver.groups import solve_group
from armor_recipes.solver.patterns import (
    Pattern,
    index_to_mask,
    magnitude_mask,
    mask_lanes,
    mask_table,
    mask_to_index,
    parse_pattern,
)
from armor_recipes.solver.sweep import SweepProblem, join_blocks, native_available, sweep
from tests.support.solver import LARGE, PATTERNS, SEEDS, cases, problem_of, random_factors


def test_masks_of_2of4_are_numbered_in_lexicographic_order() -> None:
    assert mask_lanes(parse_pattern("2:4")) == ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
    assert mask_table().int().tolist()[2] == [1, 0, 0, 1]
    assert len(mask_lanes(parse_pattern("4:8"))) == 70
    with pytest.raises(ValueError, match="groups of at most 8"):
        mask_lanes(parse_pattern("2:9"))


@pytest.mark.parametrize("text", ["", "2", "2:4:8", "-1:4", "2 : 4", "a:4", "2:100", "٢:٤"])
def test_what_is_no_pattern_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not of the form N:M"):
        parse_pattern(text)


@given(pattern=st.sampled_from([*PATTERNS, *LARGE, "16:32", "31:32"]), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_masks_keep_n_of_m_and_their_numbers_go_both_ways(pattern: str, seed: int) -> None:
    form = parse_pattern(pattern)
    scores = torch.randint(0, 5, (3, 2 * form.group), generator=torch.Generator().manual_seed(seed))
    mask = magnitude_mask(scores, form)
    for row, kept in zip(scores.tolist(), mask.tolist(), strict=True):
        for at in range(0, len(row), form.group):
            order = sorted(range(form.group), key=lambda i: (-row[at + i], i))[: form.keep]
            assert [i for i in range(form.group) if kept[at + i]] == sorted(order)
    index = mask_to_index(mask, form)
    assert index.shape == (3, 2)
    assert index.dtype == (torch.uint8 if form.group <= 8 else torch.int64)
    assert torch.equal(index_to_mask(index, form), mask)
    if form.group > 1 and not mask.all():
        with pytest.raises(ValueError, match=f"must keep exactly {form.keep}"):
            mask_to_index(torch.ones_like(mask), form)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4", "8:16"])
@pytest.mark.parametrize("block_size", [1, 6, 24])
def test_iteration_zero_is_nowag_p_in_every_pattern(pattern: str, block_size: int) -> None:
    weight, h = problem_of(3, 24, 48)
    found = factorize(weight, h, block_size=block_size, pattern=pattern, iterations=0, seed=0)
    mask, _ = nowag_mask(weight, h, pattern=pattern)
    assert torch.equal(found.mask, mask)
    torch.testing.assert_close(found.dense(), weight * mask)
    assert found.losses == pytest.approx([relative_loss(weight, h, weight * mask)])


@given(case=cases([*PATTERNS, *LARGE]), seed=SEEDS)
@settings(max_examples=40, deadline=None)
def test_no_exact_update_raises_the_loss(case: tuple[str, int, int, tuple[int, int]], seed: int) -> None:
    pattern, d_out, d_in, sizes = case
    problem, factors = random_factors(seed, d_out, d_in, sizes, parse_pattern(pattern))
    loss = squared_error(problem, factors)
    scale = float(problem.target.square().sum())
    for update in (update_core, update_a, update_b, update_core, update_b, update_a):
        update(problem, factors)
        after = squared_error(problem, factors)
        assert after <= loss * (1 + 1e-12) + 1e-20 * scale
        loss = after
    mask = index_to_mask(factors.index, problem.pattern)
    assert (mask.view(d_out, -1, problem.pattern.group).sum(-1) == problem.pattern.keep).all()
    assert not factors.core[~mask].any()


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "2:8", "1:2", "3:4"])
@given(seed=SEEDS, row=st.integers(0, 3), group=st.integers(0, 1))
@settings(max_examples=8, deadline=None)
def test_a_group_step_equals_brute_force_over_its_masks(pattern: str, seed: int, row: int, group: int) -> None:
    """Rows and groups other than one are frozen by hand; the sweep's choice for it must be the best of all masks."""
    form = parse_pattern(pattern)
    problem, factors = random_factors(seed, 4, 2 * form.group, (4, 2 * form.group), form)
    columns = slice(form.group * group, form.group * (group + 1))
    best, mask = min(group_losses(problem, factors, row, columns.start), key=lambda found: found[0])
    a, b = factors.a[0], factors.b[0]
    correlation = a.T @ residual(problem, factors) @ b.T
    for native in [False, True] if native_available() else [False]:
        dtype = torch.float32 if native else torch.float64
        lone = SweepProblem(
            correlation=correlation[row, columns].view(1, 1, 1, -1).to(dtype, copy=True),
            core=factors.core[row, columns].view(1, 1, 1, -1).to(dtype, copy=True),
            index=factors.index[row, group].view(1, 1, 1, 1).clone(),
            gram_a=(a.T @ a)[row, row].view(1, 1, 1).to(dtype),
            gram_b=(b @ b.T)[columns, columns][None].to(dtype).contiguous(),
            fixed_mask=False,
            pattern=form,
        )
        sweep(lone, native=native)
        trial = factors.clone()
        trial.core[row, columns] = lone.core.double().flatten()
        assert squared_error(problem, trial) == pytest.approx(best, rel=1e-4 if native else 1e-8)
        assert native or mask_lanes(form)[int(lone.index)] == mask


def group_losses(problem, factors, row: int, start: int) -> list[tuple[float, tuple[int, ...]]]:  # type: ignore[no-untyped-def]
    """The loss with the group's best values under each of its masks, by least squares, and the mask."""
    losses = []
    rest = factors.clone()
    rest.core[row, start : start + problem.pattern.group] = 0
    error = residual(problem, rest).flatten()[:, None]
    for mask in combinations(range(problem.pattern.group), problem.pattern.keep):
        basis = torch.stack([torch.outer(rest.a[0][:, row], rest.b[0][start + i]).flatten() for i in mask], dim=1)
        solution = torch.linalg.lstsq(basis, error).solution
        losses.append((float((error - basis @ solution).square().sum()), mask))
    return losses


@pytest.mark.parametrize("pattern", [*PATTERNS, "4:7"])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.skipif(not native_available(), reason="the compiled sweep was not built")
def test_compiled_sweep_equals_the_torch_sweep(pattern: str, fixed: bool) -> None:
    form = parse_pattern(pattern)
    width = 3 * form.group
    problem, factors = random_factors(5, 12, 2 * width, (6, width), form)
    a, b = factors.a.float(), factors.b.float()
    b[1, :, 1] = 0
    found = []
    for native in (True, False):
        work = SweepProblem(
            correlation=cut(residual(problem, factors), width),
            core=cut(factors.core, width),
            index=cut(factors.index, 3, torch.uint8),
            gram_a=(a.mT @ a).contiguous(),
            gram_b=(b @ b.mT).contiguous(),
            fixed_mask=fixed,
            pattern=form,
        )
        before = work.index.clone()
        sweep(work, native=native)
        assert torch.equal(work.index, before) == fixed
        found.append(work)
    assert torch.equal(found[0].index, found[1].index)
    torch.testing.assert_close(found[0].core, found[1].core, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[0].correlation, found[1].correlation, rtol=1e-3, atol=1e-4)


def cut(x: Tensor, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return x.view(2, 6, 2, width).transpose(1, 2).to(dtype).contiguous()


@pytest.mark.skipif(not native_available(), reason="the compiled sweep was not built")
def test_large_groups_have_no_compiled_form() -> None:
    weight, h = problem_of(0, 4, 16)
    with pytest.raises(RuntimeError, match="at most 8"):
        factorize(weight, h, block_size=4, pattern="8:16", iterations=1, seed=0, native=True)


def test_blocks_are_joined_along_the_diagonal() -> None:
    gram = torch.arange(1.0, 5.0).view(4, 1, 1)
    assert join_blocks(gram, 2).tolist() == [[[1.0, 0.0], [0.0, 2.0]], [[3.0, 0.0], [0.0, 4.0]]]
    square = torch.arange(18.0).view(2, 3, 3)
    assert torch.equal(join_blocks(square, 3), square)
    assert torch.equal(join_blocks(square, 6)[0], torch.block_diag(*square))


@pytest.mark.parametrize(("pattern", "b_i"), [("2:4", 6), ("4:8", 4), ("2:4", 1), ("8:16", 24), ("2:6", 4)])
def test_groups_that_straddle_two_blocks_are_solved_jointly(pattern: str, b_i: int) -> None:
    """B as one wide block with zeros outside its blocks must give the same sweep."""
    form = parse_pattern(pattern)
    problem, factors = random_factors(7, 8, 48, (4, b_i), form)
    wide = factors.clone()
    wide.b = torch.block_diag(*factors.b)[None]
    update_core(problem, factors)
    update_core(problem, wide)
    assert torch.equal(factors.index, wide.index)
    torch.testing.assert_close(factors.core, wide.core)


@pytest.mark.parametrize("pattern", ["6:12", "2:10", "9:10"])
def test_elimination_is_close_to_the_best_mask_of_a_large_group(
    pattern: str, record_property: Callable[[str, object], None]
) -> None:
    """Against all masks, from a random current one: never better, on average within 1 % of the loss."""
    form = parse_pattern(pattern)
    lanes = torch.tensor(list(combinations(range(form.group), form.keep)))
    assert len(lanes) == comb(form.group, form.keep)
    generator = torch.Generator().manual_seed(0)
    factor = torch.randn(32, form.group, form.group, generator=generator, dtype=torch.float64)
    gram = factor @ factor.mT / form.group + torch.eye(form.group)
    target = torch.randn(32, form.group, generator=generator, dtype=torch.float64)
    c = (gram @ target[..., None])[..., 0]
    start = mask_to_index(magnitude_mask(torch.rand(32, form.group, generator=generator), form), form)[:, 0]
    pivot = torch.ones(32, 1, dtype=torch.float64)
    values, number = solve_group(c, gram, torch.zeros_like(c), start, pivot, pattern=form, fixed_mask=False)
    minors = gram[:, lanes[:, :, None], lanes[:, None, :]]
    gains = (torch.linalg.solve(minors, c[:, lanes][..., None])[..., 0] * c[:, lanes]).sum(-1).amax(-1)
    total = (target * c).sum(-1)
    error = target - values
    loss = (error * (gram @ error[..., None])[..., 0]).sum(-1)
    ratios = (loss / (total - gains)).tolist()
    record_property(f"{pattern}: loss / best of all masks", sum(ratios) / 32)
    assert min(ratios) >= 1 - 1e-9
    assert sum(ratios) / 32 < 1.01, ratios
    assert torch.equal(index_to_mask(number[:, None], form), values != 0)


def test_a_large_group_keeps_a_mask_that_elimination_cannot_better() -> None:
    """Where what is found is worse than what is there, values and mask stay."""
    form = Pattern(2, 9)
    gram = torch.eye(9)[None]
    best = torch.tensor([[0.0, 0, 3, 0, 0, 0, 0, 0, 4]])
    index = mask_to_index(best != 0, form)[:, 0]
    none = torch.zeros_like(best)
    values, number = solve_group(none, gram, best, index, torch.ones(1, 1), pattern=form, fixed_mask=False)
    assert torch.equal(values, best)
    assert torch.equal(number, index)


@pytest.mark.parametrize("solver", ["exact", "adam"])
@pytest.mark.parametrize("pattern", ["1:4", "4:8", "1:2", "8:16"])
def test_both_solvers_take_every_pattern(solver: str, pattern: str) -> None:
    weight, h = problem_of(9, 16, 32)
    form = parse_pattern(pattern)
    found = factorize(weight, h, block_size=16, pattern=pattern, solver=solver, iterations=8, seed=0)
    assert (found.mask.view(16, -1, form.group).sum(-1) == form.keep).all()
    assert not found.core[~found.mask].any()
    assert found.losses[-1] < found.losses[0]
    assert relative_loss(weight, h, found.dense()) == pytest.approx(found.losses[-1], rel=1e-3, abs=1e-6)
    fixed = factorize(
        weight,
        h,
        block_size=16,
        pattern=pattern,
        solver=solver,
        iterations=8,
        seed=0,
        mask=found.mask.roll(form.group, 1),
    )
    assert torch.equal(fixed.mask, found.mask.roll(form.group, 1))


def test_block_size_1_is_diagonal_scaling_which_changes_nothing() -> None:
    """S absorbs diagonal A and B, so its best values are W on the best mask: NoWag-P, from any start."""
    weight, h = problem_of(15, 8, 12)
    found = factorize(weight, h, block_size=1, iterations=5, seed=0)
    mask, _ = nowag_mask(weight, h)
    torch.testing.assert_close(found.dense(), weight * mask)
    assert found.losses[-1] == pytest.approx(found.losses[0], rel=1e-5)
    problem, factors = random_factors(15, 8, 12, (1, 1))
    update_core(problem, factors)
    kept = magnitude_mask(problem.target.square())
    assert squared_error(problem, factors) == pytest.approx(float(problem.target[~kept].square().sum()))


def test_blocks_of_one_are_updated_by_the_best_diagonal_scaling() -> None:
    """For fixed S: a_i = <w_i, t_i> / <t_i, t_i> over a row, and b_j likewise over a column; unchanged where that is 0/0."""
    problem, factors = random_factors(16, 8, 12, (1, 1))
    t = factors.core * factors.b.flatten()
    update_a(problem, factors)
    wanted = (problem.target * t).sum(1) / t.square().sum(1)
    torch.testing.assert_close(factors.a.flatten(), wanted, rtol=1e-5, atol=1e-7)
    u, before = factors.a.flatten()[:, None] * factors.core, factors.b.flatten()
    kept = u.any(0)
    assert not kept.all()
    update_b(problem, factors)
    wanted = torch.where(kept, (problem.target * u).sum(0) / u.square().sum(0), before)
    torch.testing.assert_close(factors.b.flatten(), wanted, rtol=1e-5, atol=1e-7)
