"""A 2:4 core survives packing bit for bit, in the byte order of the format, and nothing damaged unpacks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from armor_recipes.checkpoint.packing import PackedLinear, pack_2of4, unpack_2of4
from armor_recipes.errors import CheckpointError
from armor_recipes.solver.blockdiag import fold
from tests.support.packed import made_up, random_mask

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """Bytes, so that 0.0 and -0.0 differ."""
    return tensor.contiguous().view(torch.uint8)


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 9), groups=st.integers(1, 6), seed=st.integers(0, 2**32), dtype=st.sampled_from(DTYPES))
def test_packing_round_trips(rows: int, groups: int, seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(rows, 8 * groups, generator)
    choices = torch.tensor([0.0, -0.0, 1.5, -2.0, 3e-5, -7.25]).to(dtype)
    core = choices[torch.randint(6, mask.shape, generator=generator)]
    kept = core.masked_fill(~mask, 0.0)

    values, bitmask = pack_2of4(core, mask)
    unpacked, unpacked_mask = unpack_2of4(values, bitmask)

    assert values.dtype == dtype
    assert values.shape == (rows, 4 * groups)
    assert torch.equal(bits(unpacked), bits(kept))
    assert torch.equal(unpacked_mask, mask)
    assert np.array_equal(bitmask.numpy(), np.packbits(mask.numpy(), axis=-1, bitorder="little"))


def test_bytes_are_those_of_compressed_tensors_0_14() -> None:
    core = torch.tensor([[0.0, 5.0, 6.0, 0.0, 7.0, 0.0, 0.0, -0.0], [1.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0, 4.0]])
    mask = torch.tensor([[0, 1, 1, 0, 1, 0, 0, 1], [1, 1, 0, 0, 0, 0, 1, 1]]).bool()

    values, bitmask = pack_2of4(core, mask)

    # Row 0 keeps columns 1, 2, 4, 7: bits 1, 2, 4, 7 of the byte. Row 1 keeps 0, 1, 6, 7.
    assert bitmask.tolist() == [[0b10010110], [0b11000011]]
    assert values.tolist() == [[5.0, 6.0, 7.0, 0.0], [1.0, 2.0, 3.0, 4.0]]
    assert torch.signbit(values).tolist()[0] == [False, False, False, True]


@pytest.mark.parametrize("block_size", [(8, 8), (16, 4), (4, 32)])
def test_folding_is_the_session_fold_of_the_rounded_factors(block_size: tuple[int, int]) -> None:
    factors = made_up(16, 32, block_size, torch.Generator().manual_seed(3))
    packed = PackedLinear.from_factorization(factors, torch.bfloat16)

    rounded = (part.bfloat16().float() for part in (factors.a, factors.core, factors.b))
    assert packed.shape == (16, 32)
    assert packed.block_size == block_size
    assert torch.equal(packed.fold(torch.float32), fold(*rounded))
    assert packed.fold(torch.bfloat16).dtype == torch.bfloat16


def test_unaligned_tensors_fold_to_the_same_bits() -> None:
    packed = PackedLinear.from_factorization(made_up(64, 64, (16, 16), torch.Generator().manual_seed(5)), torch.float32)

    def shifted(tensor: torch.Tensor) -> torch.Tensor:
        room = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
        room[1:] = tensor.reshape(-1)
        return room[1:].view(tensor.shape)

    moved = PackedLinear(shifted(packed.values), packed.bitmask, shifted(packed.a), shifted(packed.b))
    assert moved.a.data_ptr() % 64 == 4
    assert torch.equal(moved.fold(torch.float32), packed.fold(torch.float32))


def test_gradients_reach_values_and_factors() -> None:
    packed = PackedLinear.from_factorization(made_up(8, 16, (4, 8), torch.Generator().manual_seed(4)), torch.float32)
    for tensor in (packed.values, packed.a, packed.b):
        tensor.requires_grad_()
    packed.fold(torch.float32).square().sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in (packed.values, packed.a, packed.b))


@pytest.mark.parametrize(
    ("core", "mask", "says"),
    [
        (torch.zeros(2, 12), torch.tensor([[1, 1, 0, 0] * 3] * 2).bool(), "multiple of 8"),
        (torch.zeros(2, 8), torch.tensor([[1, 1, 1, 0, 1, 1, 0, 0]] * 2).bool(), "row 0, columns 0 to 3 keep 3"),
        (torch.zeros(2, 8), torch.zeros(2, 8).bool(), "keep 0 entries"),
        (torch.zeros(2, 8), torch.zeros(1, 8).bool(), "both must be"),
        (torch.zeros(1, 8), torch.ones(1, 8), "the mask bool"),
        (torch.zeros(1, 0), torch.zeros(1, 0).bool(), "0 columns"),
    ],
)
def test_what_is_not_2_of_4_is_not_packed(core: torch.Tensor, mask: torch.Tensor, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        pack_2of4(core, mask)


def damaged(**parts: torch.Tensor) -> PackedLinear:
    packed = PackedLinear.from_factorization(made_up(8, 16, (4, 8), torch.Generator().manual_seed(4)), torch.float32)
    whole = {"values": packed.values, "bitmask": packed.bitmask, "a": packed.a, "b": packed.b}
    return PackedLinear(**{**whole, **parts})


@pytest.mark.parametrize(
    ("layer", "says"),
    [
        (damaged(bitmask=torch.zeros(8, 2, dtype=torch.uint8)), "up_proj: bitmask: row 0, columns 0 to 3 keep 0"),
        (damaged(bitmask=torch.zeros(8, 3, dtype=torch.uint8)), r"up_proj: bitmask is \(8, 3\)"),
        (damaged(bitmask=torch.zeros(8, 2, dtype=torch.int32)), r"up_proj: bitmask .*torch.int32"),
        (damaged(values=torch.zeros(8, 8, dtype=torch.int8)), r"up_proj: weight .*torch.int8"),
        (damaged(values=torch.zeros(8, 6)), r"up_proj: weight is \(8, 6\)"),
        (damaged(values=torch.zeros(64)), r"up_proj: weight is \(64,\)"),
        (damaged(values=torch.full((8, 8), torch.nan)), "up_proj: weight .*64 of 64 numbers are not finite"),
        (damaged(a=torch.full((2, 4, 4), torch.inf)), "up_proj: armor_a: 32 of 32 numbers are not finite"),
        (damaged(a=torch.zeros(2, 4, 2)), r"up_proj: armor_a is \(2, 4, 2\)"),
        (damaged(b=torch.zeros(3, 8, 8)), r"up_proj: armor_b is \(3, 8, 8\)"),
        (damaged(b=torch.zeros(2, 8, 8).bfloat16()), "up_proj: armor_b .*bfloat16"),
    ],
)
def test_damage_is_named(layer: PackedLinear, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        layer.validate(name="up_proj")


def test_rounding_to_a_dtype_that_overflows_is_refused() -> None:
    factors = made_up(8, 16, (4, 8), torch.Generator().manual_seed(4))
    factors.core.mul_(1e6)
    with pytest.raises(CheckpointError, match=r"do not fit this dtype"):
        PackedLinear.from_factorization(factors, torch.float16)
