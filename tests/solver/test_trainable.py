"""`TrainableFactors`: the same weight as `fold`, the gradients of plain autograd, and nothing lost on the way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.solver import TrainableFactors, TrainableLinear
from armor_recipes.solver.blockdiag import fold
from armor_recipes.solver.patterns import magnitude_mask, parse_pattern
from tests.support.solver import SEEDS

SHAPES = st.sampled_from([("2:4", 8, 16, 4, 8), ("4:8", 6, 24, 3, 8), ("4:8", 4, 16, 4, 4), ("1:4", 5, 8, 1, 2)])


def random_parts(
    seed: int, pattern: str, d_out: int, d_in: int, b_o: int, b_i: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A, S, its mask and B with numbers of `dtype`, held in float32."""
    generator = torch.Generator().manual_seed(seed)
    core = torch.randn(d_out, d_in, generator=generator) * 0.07
    mask = magnitude_mask(core.square(), parse_pattern(pattern))
    a, b = (
        torch.eye(size) + 0.2 * torch.randn(count, size, size, generator=generator)
        for count, size in ((d_out // b_o, b_o), (d_in // b_i, b_i))
    )
    a, core, b = (part.to(dtype).float() for part in (a, core * mask, b))
    return a, core, mask, b


@given(SEEDS, SHAPES)
def test_the_weight_is_the_fold_bit_for_bit(seed: int, shape: tuple[str, int, int, int, int]) -> None:
    a, core, mask, b = random_parts(seed, *shape)
    factors = TrainableFactors(a, core, mask, b)
    assert torch.equal(factors.weight(), fold(a, core, b))
    assert torch.equal(factors.core, core)
    assert not factors.core.requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("core_is_trained", [True, False])  # without, S takes its sparse products in float32
@given(SEEDS, SHAPES)
def test_gradients_are_those_of_plain_autograd(
    dtype: torch.dtype, core_is_trained: bool, seed: int, shape: tuple[str, int, int, int, int]
) -> None:
    a, core, mask, b = random_parts(seed, *shape, torch.bfloat16)
    factors = TrainableFactors(a, core, mask, b, dtype)
    assert torch.equal(factors.core, core)
    assert factors.core.dtype == torch.float32
    values = core[mask]
    if core_is_trained:
        factors.train_core()
        assert factors.values is not None
        values = factors.values
    generator = torch.Generator().manual_seed(seed + 1)
    x, wanted = (torch.randn(2, 7, size, generator=generator).to(dtype) for size in (core.shape[1], core.shape[0]))
    x.requires_grad_()
    own = [x, factors.a, values, factors.b]
    trained = [part for part in own if part.requires_grad]
    found = torch.autograd.grad((factors.product(x) - wanted).square().sum(), trained)

    plain = [part.detach().double().requires_grad_(part.requires_grad) for part in own]
    spread = torch.zeros(core.shape, dtype=torch.float64).masked_scatter(mask, plain[2])
    weight = torch.block_diag(*plain[1]) @ spread @ torch.block_diag(*plain[3])
    true = torch.autograd.grad((plain[0] @ weight.T - wanted).square().sum(), [p for p in plain if p.requires_grad])
    assert len(found) == len(true) == (4 if core_is_trained else 3)
    first = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other, bound in zip(
        found, true, (first, max(first, 1e-2), max(first, 1e-2), max(first, 1e-2)), strict=False
    ):
        assert one.shape == other.shape
        assert one.dtype == (dtype if one is found[0] else torch.float32)
        assert float((one - other).norm()) <= bound * float(other.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_core_follows_its_values(dtype: torch.dtype) -> None:
    factors = TrainableFactors(*random_parts(0, "2:4", 8, 16, 4, 4), dtype)
    assert {name for name, _ in factors.named_parameters()} == {"a", "b"}
    before = factors.core.clone()
    factors.train_core()
    with torch.no_grad():
        factors.values.mul_(2)  # type: ignore[union-attr]
    factors.refresh()
    assert torch.equal(factors.core, 2 * before)
    product = factors.product(torch.eye(16, dtype=dtype))
    assert product.dtype == dtype
    assert torch.allclose(product.T.float(), factors.weight(), atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_a_core_that_bfloat16_does_not_hold_is_rounded_for_products_alone() -> None:
    a, core, mask, b = random_parts(2, "2:4", 8, 16, 4, 4)
    factors = TrainableFactors(a, core, mask, b, torch.bfloat16)
    assert torch.equal(factors.core, core)
    assert torch.equal(factors.weight(), fold(a, core, b))
    assert factors.product(torch.eye(16, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("bias", [True, False])
def test_a_trainable_layer_computes_what_the_folded_one_does(bias: bool) -> None:
    factors = TrainableFactors(*random_parts(1, "2:4", 16, 24, 8, 8))
    offset = torch.arange(16.0) if bias else None
    layer = TrainableLinear(factors, offset)
    x = torch.randn(2, 3, 24, generator=torch.Generator().manual_seed(0))
    plain = torch.nn.functional.linear(x, layer.weight, offset)
    assert torch.allclose(layer(x), plain, rtol=1e-4, atol=1e-5)
    assert (layer.out_features, layer.in_features) == (16, 24)
    assert layer(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_untrained_factors_pack_to_the_same_bits(dtype: torch.dtype) -> None:
    a, core, mask, b = random_parts(3, "2:4", 16, 24, 8, 4, dtype)
    core[0, :4] = 0  # a whole group, its kept values too
    factors = TrainableFactors(a, core, mask, b)
    packed = PackedLinear.from_factorization(factors, dtype)
    for found, given_part in ((packed.a, a), (packed.b, b), (packed.unpack()[0], core)):
        assert torch.equal(found.float(), given_part)
    assert torch.equal(packed.unpack()[1], mask)


def test_training_changes_neither_what_was_given_nor_the_mask() -> None:
    parts = random_parts(4, "2:4", 8, 16, 4, 4)
    before = [part.clone() for part in parts]
    factors = TrainableFactors(*parts)
    factors.train_core()
    optimizer = torch.optim.SGD(factors.parameters(), lr=0.1)
    factors.product(torch.eye(16)).square().sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    factors.refresh()
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
    assert torch.equal(factors.mask, before[2])
    assert not torch.equal(factors.core, before[1])
    assert not bool(factors.core[~factors.mask].any())
    assert {name for name, _ in factors.named_parameters()} == {"a", "values", "b"}
