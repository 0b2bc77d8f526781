"""The core as the GPU's kernel reads it: every number is found where the layout says, and no bytes are added to whole records."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.runtime.fragments import PAIR_BITS, Fragments, lay_out
from tests.runtime.test_integer_kernel import quantized
from tests.runtime.test_kernel import packed

CORES = [("float", None), ("int8", None), ("int8", 8), ("int4", None), ("int4", 24), ("int4", 32)]


def layer(rows: int, columns: int, core: str, group: int | None) -> PackedLinear:
    dtype = torch.bfloat16
    return (
        packed(rows, columns, (1, 8), dtype)
        if core == "float"
        else quantized(rows, columns, (1, 8), dtype, core, group)
    )


def read(found: Fragments, packed: PackedLinear) -> Tensor:
    """S `(O, I)`, number by number, as the module's first lines describe a record."""
    (rows, columns), bits = packed.shape, PAIR_BITS[packed.core]
    dense = torch.zeros(rows, columns)
    for row in range(rows):
        for group in range(columns // 4):
            g, h, (record, place) = row % 8, row // 8 % 2, divmod(group, 64)
            q, f, c = place // 16, place // 4 % 4, place % 4
            words = found.words[row // 16, record].tolist()

            def number(index: int, lane: int = 4 * g + c, words: list[int] = words) -> int:
                return words[index // 4 * 128 + lane * 4 + index % 4] & 0xFFFFFFFF

            mask = number(q) >> (16 * h + 4 * f) & 15
            per = 32 // bits
            code = number(4 + (8 * q + 4 * h + f) // per) >> (bits * (f % per)) & ((1 << bits) - 1)
            kept = [column for column in range(4) if mask >> column & 1]
            assert len(kept) == 2
            for column, value in zip(kept, values(code, packed.core), strict=True):
                dense[row, 4 * group + column] = value * scale(found, row, 4 * group)
    return dense


def values(code: int, core: str) -> tuple[float, float]:
    if core == "int4":
        return (code & 15) - 8, (code >> 4) - 8
    if core == "int8":
        first, second = code & 255, code >> 8
        return first - 256 * (first > 127), second - 256 * (second > 127)
    pair = torch.tensor([code], dtype=torch.int64).int().view(torch.bfloat16)
    return float(pair[0]), float(pair[1])


def scale(found: Fragments, row: int, column: int) -> float:
    if found.scale is None:
        return 1.0
    if not found.parts:
        return float(found.scale[row, 0])
    part = column % 256 * found.parts // 256
    return float(found.scale[row // 16, column // 256, row % 8, row // 8 % 2 * found.parts + part])


@pytest.mark.parametrize(("core", "group"), CORES)
@pytest.mark.parametrize("shape", [(3, 192), (21, 384)])
def test_every_number_is_where_the_layout_says(shape: tuple[int, int], core: str, group: int | None) -> None:
    tensors = layer(*shape, core, group)
    assert torch.equal(read(lay_out(tensors), tensors), tensors.unpack()[0].float())


@pytest.mark.parametrize(("core", "bytes_a_weight"), [("float", 1.125), ("int8", 0.625), ("int4", 0.375)])
def test_bytes_are_those_of_the_checkpoint(core: str, bytes_a_weight: float) -> None:
    tensors = layer(32, 512, core, None if core != "int4" else 32)
    found = lay_out(tensors)
    assert found.words.nbytes == tensors.values.nbytes + tensors.bitmask.nbytes == bytes_a_weight * 32 * 512
    if found.parts:
        assert found.scale is not None
        assert tensors.scale is not None
        assert found.scale.nbytes == tensors.scale.nbytes
