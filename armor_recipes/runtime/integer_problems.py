"""Layers and inputs of small integers, on which every sum of the kernel is exact in any order: what its self-check computes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear, pack_int4

CORES = (("float", 0), ("int8", 1), ("int8", 2), ("int4", 1), ("int4", 2), ("int4", 4))
"""Core types and scales a row of the problems."""
_LARGEST = {"float": 4, "int8": 127, "int4": 8}
"""Of its kept values; int4 ends at 7."""


def integers(shape: tuple[int, ...], most: int) -> Tensor:
    """Integers from -most to most, in an order that no kernel's layout repeats; the same ones in every process."""
    count = functools.reduce(lambda x, y: x * y, shape)
    return ((torch.arange(count, device="cpu") * 7919 + 104729) % 10007 % (2 * most + 1) - most).view(shape)


def input_of(core: str, tokens: int, columns: int) -> Tensor:
    """Integers `(tokens, columns)` for x; with int4 cores every fourth is 127 or -127."""
    if core != "int4":
        return integers((tokens, columns), 3)
    x = integers((tokens, columns), 126)
    x[:, ::4] = 127 * (2 * (x[:, ::4] > 0).to(x.dtype) - 1)
    return x


def problem_of_many(core: str, groups: int) -> PackedLinear:
    """A core of 12 rows in blocks of 4 and 256 columns in blocks of 64; A and B move each row and column to the next place."""
    a, b = (torch.eye(size, device="cpu").roll(1, 0).bfloat16() for size in (4, 64))
    values, bitmask, scale = _core(torch.bfloat16, core, groups, 12, 256)
    return PackedLinear(values, bitmask, a.repeat(3, 1, 1), b.repeat(4, 1, 1), scale)


def problem(dtype: torch.dtype, core: str, groups: int) -> tuple[PackedLinear, Tensor]:
    """A core of 27 rows in blocks of 9, with every one of the six masks; columns end within a strip, where groups let them.

    B is of small integers; with an int4 core it moves each column to the next place of its block.
    """
    columns = {"float": 104, "int8": 104, "int4": 112}[core] if groups < 2 else 256
    size = columns // 8
    b = integers((8, size, size), 1) if core != "int4" else torch.eye(size, device="cpu").roll(1, 0).expand(8, -1, -1)
    values, bitmask, scale = _core(dtype, core, groups, 27, columns)
    packed = PackedLinear(values, bitmask, integers((3, 9, 9), 1).to(dtype), b.to(dtype), scale)
    return packed, integers((27,), 5).to(dtype)


def _core(dtype: torch.dtype, core: str, groups: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Values, bitmask and scales."""
    nibbles = torch.tensor([3, 5, 6, 9, 10, 12], dtype=torch.uint8, device="cpu")
    choice = nibbles[integers((rows, columns // 4), 40) % 6]
    values = integers((rows, columns // 2), _LARGEST[core])
    values = pack_int4(values.clamp(max=7)) if core == "int4" else values.to(torch.int8 if core == "int8" else dtype)
    scale = None if core == "float" else (integers((rows, groups), 1) + 2).to(dtype)
    return values, choice[:, 0::2] | choice[:, 1::2] << 4, scale
