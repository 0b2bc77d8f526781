"""One layer: both backends compute A(S(Bx)) + bias, and what is prepared follows the packed tensors."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from armor_recipes.checkpoint.config import LayerSpec
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import CheckpointError, RecipeError
from armor_recipes.runtime.backends import BACKENDS, choose_backend
from armor_recipes.runtime.linear import ArmorLinear
from tests.support.packed import made_up

ON_CPU = sorted(BACKENDS.keys() - {"cuda"})  # which refuses a layer on the CPU: tests/runtime/test_cuda.py
X = torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(2))


def layer(dtype: torch.dtype = torch.float32, *, bias: bool = True, backend: str | None = "folded") -> ArmorLinear:
    packed = PackedLinear.from_factorization(made_up(8, 16, (4, 8), torch.Generator().manual_seed(1)), dtype)
    linear = nn.Linear(16, 8, bias=bias, dtype=dtype)
    if bias:
        linear.bias.data = torch.arange(8).to(dtype)
    made = ArmorLinear.from_packed(linear, packed)
    made.backend = backend
    return made.eval()


@pytest.mark.parametrize("bias", [False, True])
def test_backends_agree_with_the_definition(bias: bool) -> None:
    factors = made_up(8, 16, (4, 8), torch.Generator().manual_seed(1))
    a, b = (torch.block_diag(*blocks) for blocks in (factors.a, factors.b))
    expected = X @ (a @ factors.core @ b).T + (torch.arange(8) if bias else 0)
    for backend in ON_CPU:
        torch.testing.assert_close(layer(bias=bias, backend=backend)(X), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folded_has_the_bits_of_a_plain_linear(dtype: torch.dtype) -> None:
    armor = layer(dtype)
    plain = nn.functional.linear(X.to(dtype), armor.packed().fold(dtype), armor.bias)
    assert torch.equal(armor(X.to(dtype)), plain)


@pytest.mark.parametrize("backend", ON_CPU)
def test_state_dict_is_the_packed_tensors_after_a_forward_pass(backend: str) -> None:
    armor = layer(backend=backend)
    before = {name: tensor.clone() for name, tensor in armor.state_dict().items()}
    armor(X)
    assert list(before) == list(armor.state_dict()) == ["weight", "bias", "bitmask", "armor_a", "armor_b"]
    assert all(torch.equal(before[name], tensor) for name, tensor in armor.state_dict().items())


def test_prepared_once() -> None:
    armor = layer()
    armor(X)
    assert armor._prepared is not None
    first = armor._prepared[1]
    armor(X)
    assert armor._prepared[1] is first


def change_in_place(armor: ArmorLinear) -> None:
    with torch.no_grad():
        armor.armor_a.mul_(2)


def replace(armor: ArmorLinear) -> None:
    armor.armor_b = nn.Parameter(armor.armor_b.detach() * 3, requires_grad=False)


def load_other_values(armor: ArmorLinear) -> None:
    armor.load_state_dict({**armor.state_dict(), "weight": torch.ones(8, 8)})


def give_other_memory(armor: ArmorLinear) -> None:
    """No change that torch counts. What was prepared may hold addresses of memory that is free now."""
    for parameter in armor.parameters():
        parameter.data = parameter.data.clone() if parameter.dtype == torch.uint8 else parameter.data * 2


@pytest.mark.parametrize("change", [change_in_place, replace, load_other_values, give_other_memory])
@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_prepared_again_after_a_change(change: object, backend: str, dtype: torch.dtype) -> None:
    armor, x = layer(dtype, backend=backend), X.to(dtype)
    before = armor(x)
    change(armor)  # type: ignore[operator]
    fresh = ArmorLinear.from_packed(nn.Linear(16, 8), armor.packed())
    fresh.bias, fresh.backend = armor.bias, backend
    assert not torch.equal(armor(x), before)
    assert torch.equal(armor(x), fresh.eval()(x))


def test_casting_folds_again_from_the_packed_tensors() -> None:
    stored = layer(torch.bfloat16)
    stored(X.bfloat16())
    cast = copy.deepcopy(stored).float()
    assert cast.bitmask.dtype == torch.uint8
    assert cast.weight.dtype == torch.float32
    expected = nn.functional.linear(X, stored.packed().fold(torch.float32), stored.bias.float())
    assert torch.equal(cast(X), expected)
    back = cast.bfloat16()
    assert all(torch.equal(back.state_dict()[name], tensor) for name, tensor in stored.state_dict().items())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda armor: pickle.loads(pickle.dumps(armor))])
def test_copies_leave_the_folded_weight_out(copier: object) -> None:
    armor = layer()
    before = armor(X)
    other = copier(armor)  # type: ignore[operator]
    assert other._prepared is None
    assert torch.equal(other(X), before)
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(armor(X), before)


@pytest.mark.parametrize("backend", ON_CPU)
def test_factors_can_be_trained(backend: str) -> None:
    armor = layer(backend=backend).train()
    trained = [armor.weight, armor.armor_a, armor.armor_b]
    for parameter in trained:
        parameter.requires_grad_()
    optimizer = torch.optim.SGD(trained, lr=1e-2)
    losses = []
    for _ in range(3):
        loss = armor(X).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[2]
    assert torch.allclose(armor.eval()(X), armor.train()(X))


def test_to_dense_folds_for_good() -> None:
    armor = layer()
    before = armor(X)
    dense = armor.to_dense()
    assert type(dense) is nn.Linear
    assert list(dense.state_dict()) == ["bias", "weight"]
    assert torch.equal(dense(X), before)


def test_works_under_inference_mode() -> None:
    with torch.inference_mode():
        armor = layer()
        assert torch.equal(armor(X), armor(X))


def test_unknown_backends(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecipeError, match=r"backend 'fast' is unknown: choose one of .*cuda, folded, reference"):
        choose_backend("fast")
    monkeypatch.setenv("ARMOR_BACKEND", "quick")
    with pytest.raises(RecipeError, match=r"environment variable ARMOR_BACKEND 'quick'"):
        choose_backend()
    assert choose_backend("folded").name == "folded"
    monkeypatch.setenv("ARMOR_BACKEND", "reference")
    assert choose_backend().name == "reference"


def test_damaged_layer_is_named_at_the_first_pass() -> None:
    armor = layer()
    armor.label = "model.layers.0.mlp.up_proj"
    armor.bitmask.data.zero_()
    with pytest.raises(CheckpointError, match=r"model.layers.0.mlp.up_proj: bitmask: row 0"):
        armor(X)


def test_block_size_that_does_not_fit() -> None:
    with pytest.raises(CheckpointError, match=r"does not divide"):
        ArmorLinear.adopt(nn.Linear(16, 8, device="meta"), LayerSpec((3, 8)))
