from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armor_recipes.calibration.statistics import InputSecondMoment
from armor_recipes.errors import NumericalError


def test_a_hand_computed_value():
    moment = InputSecondMoment("m", 2)
    moment.update(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]))
    moment.update(torch.tensor([-2.0, 4.0]))
    assert moment.tokens == 3
    assert moment.value.tolist() == pytest.approx([14 / 3, 20 / 3])
    assert moment.value.dtype == torch.float32


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_batches_do_not_matter(rows, d_in, seed, dtype):
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)
    whole, parts = InputSecondMoment("m", d_in), InputSecondMoment("m", d_in)
    whole.update(x)
    for piece in x.split(7):
        parts.update(piece[None])
    assert parts.tokens == whole.tokens == rows
    torch.testing.assert_close(parts.value, whole.value, rtol=2e-7, atol=0)
    torch.testing.assert_close(whole.value, x.double().square().mean(0).float(), rtol=2e-7, atol=0)


def test_many_small_values_are_not_lost_in_a_large_sum():
    moment = InputSecondMoment("m", 1)
    moment.update(torch.tensor([[4096.0]]))
    for _ in range(1600):
        moment.update(torch.full((1, 1), 0.25))
    assert moment.value.item() * 1601 == pytest.approx(4096**2 + 100, abs=2)


def test_large_inputs_are_taken_in_chunks(monkeypatch):
    monkeypatch.setattr("armor_recipes.calibration.statistics._CHUNK", 8)
    moment = InputSecondMoment("m", 3)
    x = torch.arange(30.0).view(10, 3)
    moment.update(x)
    assert torch.equal(moment.value, x.square().mean(0))


def test_inputs_are_left_alone_and_no_graph_is_kept():
    x = torch.ones(2, 3, requires_grad=True)
    moment = InputSecondMoment("m", 3)
    moment.update(x)
    assert not moment.value.requires_grad
    assert torch.equal(x.detach(), torch.ones(2, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
def test_what_is_not_finite_names_the_module_and_counts(bad):
    moment = InputSecondMoment("layers.0.up", 3)
    moment.update(torch.tensor([[1.0, bad, 1.0], [1.0, 1.0, 1.0]]))
    with pytest.raises(NumericalError, match=r"layers\.0\.up .* 1 of 3 channels, over 2 calibration tokens"):
        _ = moment.value


def test_no_token_at_all():
    moment = InputSecondMoment("layers.0.up", 3)
    message = r"no calibration token reached layers\.0\.up"
    with pytest.raises(NumericalError, match=message):
        _ = moment.value
    moment.update(torch.empty(0, 3))
    with pytest.raises(NumericalError, match=message):
        _ = moment.value


@pytest.mark.parametrize("shape", [(), (4,), (3, 2)])
def test_a_wrong_width(shape):
    with pytest.raises(ValueError, match=r"inputs of m .* must be 3"):
        InputSecondMoment("m", 3).update(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(0, 7), (1, 9000), (700, 5), (700, 1537), (2500, 1677), (4096, 1001), (9000, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
def test_blocks_of_columns_do_not_show_in_a_single_bit(shape, dtype, strided):
    x = torch.randn(shape[0], 2 * shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    x = x[:, : shape[1]] if strided else x[:, : shape[1]].contiguous()
    before = x.clone()
    moment = InputSecondMoment("m", shape[1])
    moment.update(x)
    assert torch.equal(moment.state().tensors["sum"], x.double().square().sum(0))
    assert torch.equal(x, before)
