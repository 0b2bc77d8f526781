"""A pass over the values of a rounded core: each the best of its grid, given all others."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armor_recipes.solver.exact import ExactProblem, to_blocks
from armor_recipes.solver.hessian import HessianProblem, regularize
from armor_recipes.solver.quantize import kept, requantize
from armor_recipes.solver.result import Factors, SparseFactors
from armor_recipes.solver.rounding import (
    Grid,
    RoundingPass,
    native_available,
    nearest_number,
    run_pass,
    update_rounded,
)

Problem = ExactProblem | HessianProblem
native = pytest.mark.skipif(not native_available(), reason="the extension was not built")


def problem(seed: int, *, gram: bool, float8: bool = False) -> tuple[Problem, Factors, Grid]:
    """A target near to A · S · B whose S `(16, 24)` was rounded to nearest, in blocks of 4 and 6."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    a, b = (torch.eye(size) + 0.4 * normal(count, size, size) for count, size in ((4, 4), (4, 6)))
    mask = (torch.rand(16, 6, 4, generator=generator).argsort(-1) < 2).view(16, 24)
    core = normal(16, 24) * mask
    target = SparseFactors(a, core, mask, b).dense()
    grid = Grid(0.3 * mask.float(), *((-448, 448) if float8 else (-8, 7)), float8)
    step = torch.where(mask, grid.scale, 1)
    rounded = Factors(a, grid.nearest(core, step) * step * mask, b, core.new_empty(0))
    if not gram:
        return ExactProblem(target, counts=Counter()), rounded, grid
    inputs = normal(60, 24) @ normal(24, 24)
    h = inputs.T @ inputs / 60
    return HessianProblem(target, regularize((h + h.T) / 2, shrinkage=0.3, damping=0.01)[0]), rounded, grid


@pytest.mark.parametrize("gram", [False, True], ids=["diagonal", "hessian"])
@settings(max_examples=25)
@given(st.integers(0, 30), st.booleans())
def test_a_pass_never_raises_the_loss_and_stays_on_the_grid(gram: bool, seed: int, float8: bool) -> None:
    given_, factors, grid = problem(seed, gram=gram, float8=float8)
    before = given_.squared_error(factors)
    for _ in range(3):
        update_rounded(given_, factors, grid)
        after = given_.squared_error(factors)
        assert after <= before * (1 + 1e-4) + 1e-6
        before = after
    empty = grid.scale == 0
    assert not factors.core[empty].any()
    numbers = factors.core[~empty] / grid.scale[~empty]
    torch.testing.assert_close(numbers, nearest_number(numbers, grid.low, grid.high, float8=float8), rtol=1e-5, atol=0)


@pytest.mark.parametrize("gram", [False, True], ids=["diagonal", "hessian"])
def test_where_it_ends_no_single_value_can_be_better(gram: bool) -> None:
    given_, factors, grid = problem(5, gram=gram)
    for _ in range(20):
        update_rounded(given_, factors, grid)
    least = given_.squared_error(factors)
    for row, column in (grid.scale > 0).nonzero()[::7].tolist():
        for step in (-1, 1):
            other = factors.clone()
            other.core[row, column] += step * grid.scale[row, column]
            if grid.low <= float(other.core[row, column] / grid.scale[row, column]) <= grid.high:
                assert given_.squared_error(other) >= least * (1 - 1e-4)


@native
@pytest.mark.parametrize("float8", [False, True])
@pytest.mark.parametrize("gram", [False, True], ids=["diagonal", "hessian"])
def test_the_compiled_pass_does_what_the_reference_does(gram: bool, float8: bool) -> None:
    found = []
    for form in (True, False):
        given_, factors, grid = problem(1, gram=gram, float8=float8)
        update_rounded(given_, factors, grid, native=form)
        found.append(factors.core)
    torch.testing.assert_close(*found)


@native
def test_the_compiled_grid_of_float8_is_torchs() -> None:
    """Values in one row of blocks of one: each is rounded by itself, to what torch makes of it."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(4096, generator=generator) * 10.0 ** torch.randint(-4, 4, (4096,), generator=generator)
    values[:6] = torch.tensor([0.0, 1e9, -1e9, 2**-10, 2.0**-6, 464.0])
    one = torch.ones(1, 1, 1)
    work = RoundingPass(
        to_blocks(values[None].clone(), 1, 1),
        torch.zeros(1, 4096, 1, 1),
        torch.ones(1, 4096, 1, 1),
        one,
        torch.ones(4096, 1, 1),
        Grid(torch.ones(1, 4096), -448, 448, float8=True),
    )
    run_pass(work, native=True)
    assert torch.equal(work.core.flatten(), nearest_number(values, -448, 448, float8=True))


@native
def test_bits_do_not_depend_on_the_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("armor_recipes.solver.compiled._WORTH_A_THREAD", 1)
    found = []
    for threads in (1, 3):
        monkeypatch.setattr("torch.get_num_threads", lambda threads=threads: threads)
        given_, factors, grid = problem(2, gram=False)
        update_rounded(given_, factors, grid)
        found.append(factors.core)
    assert torch.equal(*found)


@native
def test_compiled_code_takes_nothing_that_does_not_fit() -> None:
    grid = Grid(torch.ones(4, 4), -8, 7)
    eye, blocks = torch.eye(4)[None], torch.zeros(1, 1, 4, 4)
    with pytest.raises(TypeError, match="gram_b"):
        run_pass(RoundingPass(blocks, blocks.clone(), blocks + 1, eye, eye[:, :2], grid), native=True)


def test_empty_rows_of_a_and_columns_of_b_are_left() -> None:
    given_, factors, grid = problem(3, gram=False)
    factors.a[0], factors.b[0] = 0, 0
    before = factors.core.clone()
    update_rounded(given_, factors, grid)
    assert torch.equal(factors.core[:4], before[:4])
    assert torch.equal(factors.core[:, :6], before[:, :6])


@pytest.mark.parametrize("resolve", [True, False])
@pytest.mark.parametrize("gram", [False, True], ids=["diagonal", "hessian"])
def test_descent_is_better_than_nearest_and_keeps_what_it_should(gram: bool, resolve: bool) -> None:
    generator = torch.Generator().manual_seed(7)
    a, b = ((torch.eye(8) + 0.2 * torch.randn(8, 8, 8, generator=generator)).bfloat16() for _ in "ab")
    mask = (torch.rand(64, 16, 4, generator=generator).argsort(-1) < 2).view(64, 64)
    given_ = SparseFactors(a, torch.randn(64, 64, generator=generator) * mask, mask, b)
    inputs = torch.randn(200, 64, generator=generator) @ torch.randn(64, 64, generator=generator)
    h = inputs.T @ inputs / 200
    g = regularize((h + h.T) / 2, shrinkage=0.3, damping=0.01)[0] if gram else None
    near, found = (
        requantize(given_, h.diagonal(), gram=g, num_bits=4, iterations=10, rounding=way, resolve=resolve)  # type: ignore[arg-type]
        for way in ("nearest", "descent")
    )
    assert found.losses[-1] < 0.9 * near.losses[-1]
    assert not found.factors.core[~mask].any()
    assert found.factors.quantized is not None
    assert torch.equal(found.factors.quantized.dequantize(), kept(found.factors.core, mask))
    if not resolve:
        assert torch.equal(found.factors.a, near.factors.a)
        assert torch.equal(found.factors.b, near.factors.b)
