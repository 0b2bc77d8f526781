"""Integers for the kept values of S: scales, rounding, and A and B re-solved around them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver import factorize, relative_loss
from armor_recipes.solver.hessian import hessian_loss, regularize
from armor_recipes.solver.quantize import (
    LEVELS,
    Requantized,
    gptq,
    input_gram,
    kept,
    kept_weights,
    requantize,
    round_to_nearest,
    spread,
)
from armor_recipes.solver.result import SparseFactors

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def moments(d_in: int) -> tuple[Tensor, Tensor]:
    """The mean squares and the Gram matrix of correlated inputs."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(200, d_in, generator=generator) @ torch.randn(d_in, d_in, generator=generator)
    gram = x.T @ x / len(x)
    return gram.diagonal().contiguous(), regularize((gram + gram.T) / 2, shrinkage=0.3, damping=0.01)[0]


def factors(dtype: torch.dtype = torch.bfloat16, *, rows: int = 24, d_in: int = 32) -> SparseFactors:
    weight = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(3))
    found = factorize(weight, moments(d_in)[0], block_size=8, iterations=5, seed=0)
    return SparseFactors(found.a.to(dtype), found.core.to(dtype), found.mask, found.b.to(dtype))


def run(given_: SparseFactors, **options: object) -> Requantized:
    h, gram = moments(given_.mask.shape[1])
    wanted = {"num_bits": 4, "iterations": 6, **options}
    return requantize(given_, h, gram=gram if wanted.pop("gram", False) else None, **wanted)  # type: ignore[arg-type]


def test_values_on_the_grid_are_kept_exactly() -> None:
    integers = torch.tensor([[7.0, -3, 0, 5], [-8, 1, 2, 7], [127, -127, 1, 0]])
    scales = torch.tensor([[0.5], [0.25], [2.0]])
    found = round_to_nearest(integers[:1] * 0.5, torch.ones(1, 4), num_bits=4, dtype=torch.bfloat16)
    assert found.integers.tolist() == [[7, -3, 0, 5]]
    assert found.scale.tolist() == [[0.5]]
    found = round_to_nearest(integers[2:] * scales[2:], torch.ones(1, 4), num_bits=8, dtype=torch.bfloat16)
    assert found.integers.tolist() == [[127, -127, 1, 0]]
    assert torch.equal(found.dequantize(), integers[2:] * 2)


def test_a_group_counts_kept_values_and_has_a_scale_of_its_own() -> None:
    values = torch.cat((torch.full((1, 8), 7.0), torch.full((1, 8), 0.875)), dim=1)
    found = round_to_nearest(values, torch.ones_like(values), num_bits=4, group_size=8, dtype=torch.float32)
    assert found.scale.tolist() == [[1.0, 0.125]]
    assert torch.equal(found.dequantize(), values)


def test_heavy_values_decide_the_scale() -> None:
    values = torch.tensor([[10.0, 4.0, 4.0, 4.0]])
    clipped = round_to_nearest(values, torch.tensor([[0.0, 1, 1, 1]]), num_bits=4, dtype=torch.float32)
    reaching = round_to_nearest(values, torch.tensor([[1e6, 1, 1, 1]]), num_bits=4, dtype=torch.float32)
    assert float((clipped.dequantize() - values)[0, 1].abs()) < float((reaching.dequantize() - values)[0, 1].abs())
    assert abs(float(reaching.dequantize()[0, 0]) - 10) < 0.1


def test_zeros_have_scale_one() -> None:
    found = round_to_nearest(torch.zeros(2, 8), torch.ones(2, 8), num_bits=8, dtype=torch.float16)
    assert found.scale.tolist() == [[1.0], [1.0]]
    assert not bool(found.integers.any())


@given(st.data())
def test_integers_are_in_range_and_never_worse_than_plain_rounding(data: st.DataObject) -> None:
    bits, group = data.draw(st.sampled_from((8, 4))), data.draw(st.sampled_from((None, 4, 8)))
    dtype = data.draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    values = torch.randn(3, 16, generator=generator) * 10.0 ** data.draw(st.integers(-3, 3))
    weights = torch.rand(3, 16, generator=generator)
    found = round_to_nearest(values, weights, num_bits=bits, group_size=group, dtype=dtype)
    low, high = LEVELS[bits]
    assert low <= int(found.integers.min())
    assert int(found.integers.max()) <= high
    assert found.scale.dtype == dtype
    assert bool((found.scale > 0).all())
    parts = values.unflatten(1, (-1, group or 16))
    plain = (parts.abs().amax(-1, keepdim=True) / high).to(dtype).float().clamp(min=1e-30)
    rounded = ((parts / plain).round().clamp(low, high) * plain).flatten(1)
    best, other = ((weights * (values - x).square()).sum() for x in (found.dequantize(), rounded))
    assert float(best) <= float(other) * (1 + 1e-5) + 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gram", [False, True])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 8)])
def test_what_is_returned_is_consistent(dtype: torch.dtype, gram: bool, bits: int, group: int | None) -> None:
    before = factors(dtype)
    found = run(before, gram=gram, num_bits=bits, group_size=group)
    after = found.factors
    assert after.quantized is not None
    assert torch.equal(after.mask, before.mask)
    assert torch.equal(after.core, spread(after.quantized.dequantize(), before.mask))
    assert {after.a.dtype, after.b.dtype, after.quantized.scale.dtype} == {dtype}
    assert all(later < earlier for earlier, later in pairwise(found.losses))
    h, matrix = moments(32)
    target, product = before.dense(), after.dense()
    measure = (
        hessian_loss(target, matrix, product, normalize=False)
        if gram
        else relative_loss(target, h, product, normalize=False)
    )
    assert measure <= found.losses[0] * (1 + 1e-5)
    if dtype == torch.float32:
        assert measure == pytest.approx(found.losses[-1], rel=1e-3)


@pytest.mark.parametrize("gram", [False, True])
def test_the_re_solve_lowers_the_loss_by_a_lot(gram: bool) -> None:
    found = run(factors(), gram=gram)
    assert found.losses[-1] < 0.8 * found.losses[0]
    left = run(factors(), gram=gram, iterations=0)
    assert left.losses == found.losses[:1]
    left = run(factors(), gram=gram, iterations=0, gauge=False)
    assert torch.equal(left.factors.a, factors().a)
    assert torch.equal(left.factors.b, factors().b)


def test_a_gain_smaller_than_rounding_is_not_taken() -> None:
    """S is on the grid already: A and B can only lose, being rounded again."""
    exact = factors(torch.bfloat16)
    values = kept(exact.core, exact.mask)
    on_grid = round_to_nearest(values, torch.ones_like(values), num_bits=8, dtype=torch.bfloat16)
    start = SparseFactors(exact.a, spread(on_grid.dequantize(), exact.mask), exact.mask, exact.b)
    found = run(start, num_bits=8)
    assert found.losses[-1] < 1e-6
    assert bool((found.factors.dense() - start.dense()).abs().max() < 1e-3)


def test_gptq_keeps_masks_and_is_better_where_inputs_correlate() -> None:
    before = factors()
    gram = moments(32)[1]
    inner = input_gram(before.b, gram)
    values = kept(before.core, before.mask)
    plain = round_to_nearest(values, kept_weights(before, moments(32)[0], gram), num_bits=4, dtype=torch.bfloat16)
    found = gptq(values, before.mask, inner, plain)
    assert torch.equal(found.scale, plain.scale)

    def rows(part: Tensor) -> Tensor:
        error = spread(values - part, before.mask)
        return ((error @ inner) * error).sum(1)

    assert bool((rows(found.dequantize()) <= rows(plain.dequantize()) * (1 + 1e-5)).all())
    assert float(rows(found.dequantize()).sum()) < 0.9 * float(rows(plain.dequantize()).sum())
    assert run(before, gram=True, rounding="gptq").losses[0] < run(before, gram=True).losses[0]


def test_gptq_on_uncorrelated_inputs_is_rounding() -> None:
    before = factors()
    values = kept(before.core, before.mask)
    plain = round_to_nearest(values, torch.ones_like(values), num_bits=4, dtype=torch.bfloat16)
    assert torch.equal(gptq(values, before.mask, torch.eye(32), plain).integers, plain.integers)


def test_weights_are_the_mean_squares_of_bx() -> None:
    before = factors(torch.float32)
    h, gram = moments(32)
    b = torch.block_diag(*before.b)
    assert torch.allclose(kept_weights(before, h), kept((b.square() @ h).expand(24, 32), before.mask), rtol=1e-4)
    expected = kept((b @ gram @ b.T).diagonal().expand(24, 32), before.mask)
    assert torch.allclose(kept_weights(before, h, gram), expected, rtol=1e-4)


def test_bits_depend_on_the_arguments_alone() -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first, again = (run(factors(), gram=True, rounding="gptq") for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert first.losses == again.losses
    for part in ("a", "b", "core"):
        assert torch.equal(getattr(first.factors, part), getattr(again.factors, part))


def test_stacked_factors_come_apart_again() -> None:
    one, two = factors(rows=24), factors(rows=16)
    two = SparseFactors(two.a, two.core, two.mask, one.b)
    stacked = SparseFactors.stack([one, two])
    assert stacked.core.shape == (40, 32)
    found = run(stacked, group_size=8).factors
    parts = found.split([24, 16])
    assert [part.a.shape[0] for part in parts] == [3, 2]
    assert all(part.b is found.b for part in parts)
    assert torch.equal(torch.cat([part.dense() for part in parts]), found.dense())
    assert [tuple(p.quantized.scale.shape) for p in parts if p.quantized is not None] == [(24, 2), (16, 2)]


def test_dead_channels_are_counted_and_bad_numbers_refused() -> None:
    h, _ = moments(32)
    dead = h.clone()
    dead[3] = 0
    assert requantize(factors(), dead, num_bits=8, iterations=1).counts["dead_channels"] == 1
    with pytest.raises(NumericalError, match="not finite"):
        requantize(factors(), h * torch.nan, num_bits=8, iterations=1)
    bad = factors()
    bad.a[0, 0, 0] = torch.inf
    with pytest.raises(NumericalError, match="factors hold numbers that are not finite"):
        requantize(bad, h, num_bits=8, iterations=1)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_bits": 3}, "num_bits=3 is not one of 8, 4"),
        ({"group_size": 5}, "group_size=5 does not divide the 16 kept values"),
        ({"rounding": "gptq"}, "needs the Gram matrix"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        run(factors(), **options)
    with pytest.raises(ValueError, match="second_moment must be"):
        requantize(factors(), torch.ones(8), num_bits=8, iterations=1)


def test_gptq_on_inputs_that_are_not_positive_definite_says_what_to_do() -> None:
    values, mask = torch.ones(2, 2), torch.tensor([[True, True, False, False]]).expand(2, 4)
    start = round_to_nearest(values, values, num_bits=8, dtype=torch.float32)
    gram = torch.tensor([[1.0, 2, 0, 0], [2, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
    with pytest.raises(NumericalError, match=r"Hessians of rows' kept values: 2 of 2 .*raise `damping` or `shrinkage`"):
        gptq(values, mask, gram, start)
