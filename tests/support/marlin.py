"""Layers packed for the Marlin kernel one number at a time, as the kernel's threads take them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armor_recipes.checkpoint.packing import pack_2of4

GOLDEN = Path(__file__).parents[1] / "checkpoint" / "golden_marlin.safetensors"
"""What compressed-tensors 0.14.0.1 makes of `CASES`, tensors by case and name."""
#: Bits, (O, I), and whether 128 columns have a scale, or the whole row.
CASES: dict[str, tuple[int, tuple[int, int], bool]] = {
    "int4 groups": (4, (64, 384), True),
    "int4 two groups": (4, (64, 256), True),  # to the packer, whose columns are half as many, this is one group
    "int4 channel": (4, (128, 32), False),
    "int8 groups": (8, (64, 384), True),
    "int8 channel": (8, (64, 96), False),
}


def sample(bits: int, shape: tuple[int, int], *, grouped: bool, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Integers `(O, I)` int8 (none of the kept ones 0), which are kept, and scales `(O, G)` fp16; integer arithmetic alone.

    Integer times scale is exact in fp16, so that quantising the product gives the integer back.
    """
    rows, columns = shape
    index = torch.arange(rows * columns).view(shape) + 7919 * (seed + 1)
    mixed = (index * 2654435761 % 2**32) >> 9
    integers = mixed % (1 << bits) - (1 << (bits - 1))
    integers[integers == 0] = -(1 << (bits - 1))
    pairs = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 0, 1], [0, 1, 1, 0], [0, 1, 0, 1], [0, 0, 1, 1]])
    mask = pairs[(mixed[:, ::4] >> 8) % 6].view(shape).bool()
    groups = columns // 128 if grouped else 1
    numbers = (torch.arange(rows * groups).view(rows, groups) * 40503 + seed) % 1013
    scale = ((4 + numbers % 4) * 2.0 ** -(8 + numbers % 3)).half()
    return (integers * mask).to(torch.int8), mask, scale


def dense(integers: Tensor, scale: Tensor) -> Tensor:
    """The weight `(O, I)` float32."""
    return (integers.float().unflatten(1, (scale.shape[1], -1)) * scale.float().unsqueeze(-1)).flatten(1)


def pack_marlin(integers: Tensor, mask: Tensor, scale: Tensor, bits: int) -> dict[str, Tensor]:
    """The three tensors by their names after the module's."""
    kept, bitmask = pack_2of4(integers.float(), mask)
    return {
        "weight_packed": _pack_integers(kept.long() + (1 << (bits - 1)), bits),
        "scale_packed": _pack_scales(scale, columns=mask.shape[1]),
        "meta": _pack_meta(bitmask),
    }


def _pack_integers(unsigned: Tensor, bits: int) -> Tensor:
    rows, kept = unsigned.shape
    words = [[0] * (rows * 16 * bits // 32) for _ in range(kept // 16)]
    for n, row in enumerate(unsigned.tolist()):
        tile, half, block, j = n % 64 // 16, n % 16 // 8, n % 8 // 4, n % 4
        for k, number in enumerate(row):
            high, q, low = k % 16 // 8, k % 8 // 2, k % 2
            own = 4 * low + 2 * block + high if bits == 4 else 4 * block + 2 * low + high
            place = 1024 * (n // 64) + 32 * (8 * tile + 4 * half + q) + 8 * j + own
            words[k // 16][place * bits // 32] |= number << (place * bits % 32)
    return _signed(words, 32).to(torch.int32)


def _pack_meta(bitmask: Tensor) -> Tensor:
    rows, half_bytes = bitmask.shape[0], [bitmask & 15, bitmask >> 4]
    nibbles = torch.stack(half_bytes, -1).flatten(1).tolist()
    columns = len(nibbles[0]) // 4
    flat = [0] * (rows * columns)
    for r, row in enumerate(nibbles):
        for c in range(columns):
            number = 0
            for g, nibble in enumerate(row[4 * c : 4 * c + 4]):
                first, second = (bit for bit in range(4) if nibble >> bit & 1)
                number |= (first | second << 2) << (4 * g)
            moved = 64 * (r // 64) + 32 * (r // 2 % 2) + 4 * (r % 64 // 8) + 2 * (r % 2) + c % 2
            flat[c // 2 * 2 * rows + 2 * moved + r // 4 % 2] = number
    return _signed([flat], 16).to(torch.int16).view(columns // 2, 2 * rows)


def _pack_scales(scale: Tensor, *, columns: int) -> Tensor:
    stored = scale.T.contiguous()
    if len(stored) > 1 and columns > 256:
        stored = stored.view(-1, 8)[:, [0, 4, 1, 5, 2, 6, 3, 7]].reshape(stored.shape)
    return stored


def _signed(words: list[list[int]], bits: int) -> Tensor:
    return torch.tensor([[word - (1 << bits) if word >> (bits - 1) else word for word in row] for row in words])


def marlin_config(bits: int, *, grouped: bool) -> dict[str, Any]:
    """The `quantization_config` of a folder, as compressed-tensors 0.14.0.1 writes it."""
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": 128 if grouped else None,
        "num_bits": bits,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group" if grouped else "channel",
        "symmetric": True,
        "type": "int",
    }
    group = {
        "format": "marlin-24",
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    return {
        "config_groups": {"group_0": group},
        "format": "marlin-24",
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.14.0.1",
    }
