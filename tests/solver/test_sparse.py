"""`SparseMatrix` and `SparseCore`: products over kept values alone, against dense ones in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from armor_recipes.solver.patterns import index_to_mask, parse_pattern
from armor_recipes.solver.sparse import SparseCore, SparseMatrix, _native_product

pytestmark = pytest.mark.skipif(_native_product() is None, reason="the extension was not built")


def sparse(rows: int, columns: int, seed: int) -> tuple[Tensor, Tensor]:
    """A 2:4 core of bfloat16 numbers in float32, and its mask."""
    generator = torch.Generator().manual_seed(seed)
    mask = index_to_mask(torch.randint(6, (rows, columns // 4), generator=generator), parse_pattern("2:4"))
    return torch.randn(rows, columns, generator=generator).bfloat16().float() * mask, mask


@given(
    tokens=st.integers(1, 140),
    rows=st.integers(1, 40),
    groups=st.integers(1, 36),
    plain=st.booleans(),
    seed=st.integers(0, 99),
)
def test_products_are_those_of_the_dense_core(tokens: int, rows: int, groups: int, plain: bool, seed: int) -> None:
    core, mask = sparse(rows, 4 * groups, seed)
    found = SparseCore.of(core, mask)
    assert found is not None
    generator = torch.Generator().manual_seed(seed + 1)
    for matrix, dense in ((found.forward, core), (found.backward, core.T)):
        x = torch.randn(tokens, dense.shape[1], generator=generator)
        wanted, bound = x.double() @ dense.double().T, x.double().abs() @ dense.double().abs().T
        y = matrix.times(x, plain=plain)
        assert y.shape == (tokens, dense.shape[0])
        assert bool(((y.double() - wanted).abs() <= 1e-6 * groups * bound + 1e-30).all())


def test_bits_do_not_depend_on_threads_or_on_the_rows_beside() -> None:
    core, mask = sparse(48, 200, 0)
    matrix = SparseMatrix.of(core.bfloat16(), mask)
    x = torch.randn(300, 200, generator=torch.Generator().manual_seed(1))
    one = matrix.times(x)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(matrix.times(x), one)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat([matrix.times(part) for part in x.split(7)]), one)


def test_kept_zeros_and_infinite_inputs_are_kept() -> None:
    core, mask = sparse(4, 8, 0)
    core[0] = 0
    x = torch.zeros(1, 8)
    x[0, int(mask[0].nonzero()[0])] = float("inf")
    y = SparseMatrix.of(core.bfloat16(), mask).times(x)
    assert bool(y[0, 0].isnan())  # 0 · inf, as in a dense product


def test_a_core_that_is_no_bfloat16_is_left_to_dense_products() -> None:
    core, mask = sparse(8, 16, 0)
    assert SparseCore.of(core + mask * 1e-4, mask) is None
    assert SparseCore.of(core.half().float(), mask) is not None
