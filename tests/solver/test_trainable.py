"""`TrainableFactors`: the same weight as `fold`, the gradients of plain autograd, and nothing lost on the way back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from solver_samples import SEEDS
from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.solver import TrainableFactors
from armor_recipes.solver.blockdiag import fold
from armor_recipes.solver.patterns import magnitude_mask, parse_pattern

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


@given(SEEDS, SHAPES)
def test_gradients_are_those_of_plain_autograd(seed: int, shape: tuple[str, int, int, int, int]) -> None:
    a, core, mask, b = random_parts(seed, *shape)
    factors = TrainableFactors(a, core, mask, b)
    wanted = torch.randn(core.shape, generator=torch.Generator().manual_seed(seed + 1))
    (factors.weight() - wanted).square().sum().backward()  # type: ignore[no-untyped-call]

    plain = [part.double().requires_grad_() for part in (a, core[mask], b)]
    spread = torch.zeros(core.shape, dtype=torch.float64).masked_scatter(mask, plain[1])
    weight = torch.block_diag(*plain[0]) @ spread @ torch.block_diag(*plain[2])
    (weight - wanted).square().sum().backward()  # type: ignore[no-untyped-call]

    for found, true in zip((factors.a, factors.values, factors.b), plain, strict=True):
        assert found.grad is not None
        assert true.grad is not None
        assert found.grad.shape == found.shape
        assert float((found.grad - true.grad).norm()) <= 1e-5 * float(true.grad.norm())


def test_nothing_of_the_weights_size_is_kept_for_the_backward_pass() -> None:
    factors = TrainableFactors(*random_parts(0, "2:4", 64, 128, 8, 8))
    saved = factors.weight().grad_fn.saved_tensors  # type: ignore[union-attr]
    assert sum(part.nbytes for part in saved if part.is_floating_point()) < 64 * 128 * 4


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
    optimizer = torch.optim.SGD(factors.parameters(), lr=0.1)
    factors.weight().square().sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert all(torch.equal(part, old) for part, old in zip(parts, before, strict=True))
    assert torch.equal(factors.mask, before[2])
    assert not torch.equal(factors.core, before[1])
    assert not bool(factors.core[~factors.mask].any())
    assert {name for name, _ in factors.named_parameters()} == {"a", "values", "b"}
