"""GPTQ of a whole weight, held against its formula and against rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver.gptq import gptq_weight
from tests.solver.test_baselines import loss, problem

SEEDS = st.integers(0, 2**31)
STEP = 0.25


def nearest(values: Tensor, _: int) -> Tensor:
    return (values / STEP).round() * STEP


def literal(weight: Tensor, gram: Tensor, order: list[int]) -> Tensor:
    """OBQ one column at a time in float64: the inverse Hessian of the columns that are left, computed anew for each."""
    w, h, left = weight.double().clone(), gram.double(), list(order)
    while left:
        j = left[0]
        inverse = torch.linalg.inv(h[left][:, left])
        found = nearest(w[:, j].float(), j).double()
        w[:, left] -= ((w[:, j] - found) / inverse[0, 0])[:, None] * inverse[0]
        w[:, j] = found
        left.pop(0)
    return w.float()


@given(seed=SEEDS, columns=st.integers(1, 20), descending=st.booleans())
@settings(max_examples=25, deadline=None)
def test_it_is_obq_column_by_column(seed: int, columns: int, descending: bool) -> None:
    weight, gram = problem(seed, 4, 12)
    found, counts = gptq_weight(weight, gram, nearest, damping=0.0, block_columns=columns, descending=descending)
    order = gram.diagonal().argsort(descending=True).tolist() if descending else list(range(12))
    wanted = literal(weight, gram, order)
    assert counts == {}
    assert torch.equal(found, wanted)


@given(seed=SEEDS)
@settings(max_examples=25, deadline=None)
def test_it_is_on_the_grid_and_without_correlations_the_nearest(seed: int) -> None:
    weight, gram = problem(seed, 6, 16)
    found, _ = gptq_weight(weight, gram, nearest)
    assert torch.equal(nearest(found, 0), found)
    alone, _ = gptq_weight(weight, torch.diag(gram.diagonal()), nearest)
    assert torch.equal(alone, nearest(weight, 0))


def test_it_is_better_than_the_nearest() -> None:
    weight, gram = problem(4, 16, 64)
    found, _ = gptq_weight(weight, gram, nearest)
    assert loss(weight - found, gram) < 0.7 * loss(weight - nearest(weight, 0), gram)


def test_columns_come_with_their_numbers() -> None:
    weight, gram = problem(5, 3, 8)
    seen: list[int] = []
    gptq_weight(weight, gram, lambda values, number: (seen.append(number), values)[1])
    assert seen == gram.diagonal().argsort(descending=True).tolist()


def test_a_mask_of_zeros_stays() -> None:
    weight, gram = problem(6, 8, 16)
    weight[:, ::2] = 0
    found, counts = gptq_weight(weight, gram, nearest)
    assert not bool(found[:, ::2].any())
    assert counts == {"kept_zeros": 64}
    weight[:, ::2] = 1e-6
    assert "kept_zeros" not in gptq_weight(weight, gram, nearest)[1]


def test_dead_channels_are_zero_and_counted() -> None:
    weight, gram = problem(7, 4, 8)
    gram[3] = gram[:, 3] = 0
    found, counts = gptq_weight(weight, gram, nearest)
    assert not bool(found[:, 3].any())
    assert counts == {"dead_channels": 1}


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gram \(I, I\), got \(2, 4\) and \(3, 3\)"):
        gptq_weight(torch.ones(2, 4), torch.eye(3), nearest)
    with pytest.raises(NumericalError, match="are not positive definite even with"):
        gptq_weight(torch.ones(2, 2), torch.tensor([[1.0, 9], [9, 1]]), nearest)
