"""A 2:4 core in the order in which the GPU's kernel for few tokens reads it: laid out once, when a layer is loaded.

A record holds 16 rows and 256 columns for the 32 lanes of one warp, lane `4g + c` what it will give to the tensor cores itself
(`mma.m16n8k16`, rows g and g + 8): so a warp reads 512 contiguous bytes at a time, 16 a lane, and no weight passes from one
lane to another, nor through shared memory. Columns are counted in groups of four, group `16q + 4f + c` of the record, rows as
`8h + g`; a record is int32 numbers, for each lane:

- 4 of masks: number q has the four bits of (h, f) at bit `16h + 4f`, as the checkpoint's bitmask has them;
- 32 (floats), 16 (int8) or 8 (int4) of kept values, in the order (q, h, f): the two of a group side by side, the first one in
  the lower bits, as many groups in a number as fit.

All numbers of the same place in their lanes' order stand together, by fours: `(record, place / 4, lane, place % 4)`. Bytes are
those of the checkpoint, 1.125, 0.625 and 0.375 a weight with bfloat16, int8 and int4 (dense: 2), but for rows and columns that
fill up the last records.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from armor_recipes.checkpoint.packing import PackedLinear

ROWS, COLUMNS = 16, 256
"""Of one record."""
PAIR_BITS = {"float": 32, "int8": 16, "int4": 8}
"""Of the two kept values of a group of four columns, by core type; floats of 16 bits."""


@dataclass(frozen=True, slots=True)
class Fragments:
    """A core as the kernel reads it."""

    words: Tensor
    """`(O/16, I/256, 128 + …)` int32, both counts rounded up: the records."""
    scale: Tensor | None
    """Of a core with groups `(O/16, I/256, 8, 2n)`, the factors of rows g and g + 8 for n parts of the columns each; of one with
    whole rows `(O, 1)`; None where the core is not quantised."""
    parts: int
    """n: 4 where groups are whole runs of 64 columns, else 16; 0 without groups."""


def lay_out(packed: PackedLinear) -> Fragments:
    """Order a core, float (bfloat16 or float16), int8 or int4, for `core_kernel`. The layer has to be valid."""
    masks = torch.stack([packed.bitmask & 15, packed.bitmask >> 4], -1).flatten(1)
    kept = packed.values.contiguous()
    stored = {"float": torch.int32, "int8": torch.int16, "int4": torch.uint8}[packed.core]
    words = torch.cat([_words(masks, 4), _words(kept.view(stored), PAIR_BITS[packed.core])], 2).flatten(2)
    if packed.scale is None or packed.scale.shape[1] == 1:
        return Fragments(words, packed.scale, 0)
    group = packed.shape[1] // packed.scale.shape[1]  # columns
    parts = 4 if group % 64 == 0 else 16
    place = torch.arange(0, packed.shape[1], COLUMNS // parts, device=kept.device) // group
    scale = _padded(packed.scale[:, place], parts).unflatten(0, (-1, 2, 8)).unflatten(3, (-1, parts))
    return Fragments(words, scale.permute(0, 3, 2, 1, 4).flatten(3).contiguous(), parts)


def _words(codes: Tensor, bits: int) -> Tensor:
    """`(O/16, I/256, numbers / 4, 32 · 4)` int32 from one code of so many bits for each group of four columns `(O, I/4)`."""
    held = _padded(codes, COLUMNS // 4).unflatten(0, (-1, 2, 8)).unflatten(3, (-1, 4, 4, 4))
    held = held.permute(0, 3, 2, 6, 4, 1, 5)  # rows' and columns' record, g, c, q, h, f
    if bits < 32:
        held = held.flatten(5).unflatten(5, (-1, 32 // bits))
        shifts = torch.arange(0, 32, bits, device=codes.device)
        held = ((held.long() & ((1 << bits) - 1)) << shifts).sum(-1)
        held = torch.where(held >= 1 << 31, held - (1 << 32), held).int()
    by_lane = held.flatten(4).flatten(2, 3).unflatten(3, (-1, 4))
    ordered: Tensor = by_lane.transpose(2, 3).flatten(3).contiguous()
    return ordered


def _padded(found: Tensor, columns: int) -> Tensor:
    """With zeros, which are no kept values, up to whole records."""
    filled: Tensor = pad(found, (0, -found.shape[1] % columns, 0, -found.shape[0] % ROWS))
    return filled
