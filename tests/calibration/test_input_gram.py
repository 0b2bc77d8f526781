from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from armor_recipes.calibration.statistics import InputGram, InputSecondMoment
from armor_recipes.errors import NumericalError


def test_a_hand_computed_value():
    gram = InputGram("m", 2)
    gram.update(torch.tensor([[[1.0, 2.0], [3.0, 0.0]]]))
    gram.update(torch.tensor([-2.0, 4.0]))
    assert gram.tokens == 3
    assert gram.value.flatten().tolist() == pytest.approx([14 / 3, -2, -2, 20 / 3])
    assert gram.diagonal.tolist() == pytest.approx([14 / 3, 20 / 3])
    assert gram.value.dtype == gram.diagonal.dtype == torch.float32


@given(st.integers(1, 40), st.integers(1, 6), st.integers(0, 1000), st.sampled_from([torch.float32, torch.bfloat16]))
def test_batches_do_not_matter_beyond_rounding(rows, d_in, seed, dtype):
    x = torch.randn(rows, d_in, generator=torch.Generator().manual_seed(seed)).to(dtype)
    whole, parts, again = InputGram("m", d_in), InputGram("m", d_in), InputGram("m", d_in)
    whole.update(x)
    for piece in x.split(7):
        parts.update(piece[None])
        again.update(piece[None])
    assert parts.tokens == whole.tokens == rows
    assert torch.equal(parts.value, again.value)
    torch.testing.assert_close(parts.value, whole.value, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(whole.value, (x.double().T @ x.double() / rows).float(), rtol=2e-6, atol=2e-6)


@given(st.integers(0, 1000))
def test_the_value_is_exactly_symmetric_and_agrees_with_the_second_moment(seed):
    x = torch.randn(50, 9, generator=torch.Generator().manual_seed(seed))
    gram, moment = InputGram("m", 9), InputSecondMoment("m", 9)
    gram.update(x)
    moment.update(x)
    assert torch.equal(gram.value, gram.value.T)
    assert torch.equal(gram.value.diagonal(), gram.diagonal)
    torch.testing.assert_close(gram.diagonal, moment.value, rtol=1e-6, atol=0)


def test_many_small_values_are_not_lost_in_a_large_sum():
    gram = InputGram("m", 1)
    gram.update(torch.tensor([[4096.0]]))
    for _ in range(1600):
        gram.update(torch.full((1, 1), 0.25))
    assert gram.value.item() * 1601 == pytest.approx(4096**2 + 100, abs=2)


def test_rows_are_taken_in_chunks(monkeypatch):
    gram = InputGram("m", 3)
    seen = []
    share = gram._share
    monkeypatch.setattr(gram, "_share", lambda rows: seen.append(len(rows)) or share(rows))
    gram.update(torch.ones(3, 1500, 3))
    assert seen == [2048, 2048, 404]
    assert torch.equal(gram.value, torch.ones(3, 3))


def test_inputs_are_left_alone_and_no_graph_is_kept():
    x = torch.ones(2, 3, requires_grad=True)
    gram = InputGram("m", 3)
    gram.update(x)
    before = gram.value
    before.zero_()
    assert torch.equal(gram.value, torch.ones(3, 3))
    assert not gram.value.requires_grad
    assert torch.equal(x.detach(), torch.ones(2, 3))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("what", ["value", "diagonal"])
def test_what_is_not_finite_names_the_module_and_counts(bad, what):
    gram = InputGram("layers.0.up", 3)
    gram.update(torch.tensor([[1.0, bad, 1.0], [1.0, 1.0, 1.0]]))
    with pytest.raises(NumericalError, match=r"layers\.0\.up .* 1 of 3 channels, over 2 calibration tokens"):
        getattr(gram, what)


def test_no_token_at_all():
    gram = InputGram("layers.0.up", 3)
    message = r"no calibration token reached layers\.0\.up"
    with pytest.raises(NumericalError, match=message):
        _ = gram.value
    gram.update(torch.empty(0, 3))
    with pytest.raises(NumericalError, match=message):
        _ = gram.diagonal


@pytest.mark.parametrize("shape", [(), (4,), (3, 2)])
def test_a_wrong_width(shape):
    with pytest.raises(ValueError, match=r"inputs of m .* must be 3"):
        InputGram("m", 3).update(torch.zeros(shape))
