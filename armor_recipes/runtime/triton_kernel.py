"""The Triton kernels of the backend `cuda`, from the packed core, float or quantised: `y = S x` for a few tokens, and S itself.

Importing this module imports Triton, so `armor_recipes.runtime.cuda` does it when the kernel is first needed. With
TRITON_INTERPRET=1 set before, Triton's interpreter runs it on CPU tensors, which is how it is tested without a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.compute import check_tensors
from armor_recipes.runtime.cuda import MOST_TOKENS

#: A program's tile of S: rows, and groups of four columns. Sixteen rows are the least that `tl.dot` takes, and give the most
#: programs. Neither was tuned on a GPU.
_ROWS, _FOURS = 16, 64


def run_core(x: Tensor, packed: PackedLinear) -> Tensor:
    """Compute `S x`, summed in float32 and rounded once.

    An integer times its scale is rounded to x's dtype first, as the backend `reference` does.

    Args:
        x: `(T, I)` in the dtype of the packed floats, T at most MOST_TOKENS, on the layer's CUDA device.
        packed: a valid layer (`PackedLinear.validate`); the kernel trusts shapes, dtypes and bitmask.

    Returns:
        `(T, O)` in x's dtype.
    """
    tokens, (rows, columns) = x.shape[0], packed.shape
    x = x.contiguous()
    if tokens > MOST_TOKENS:
        raise TypeError(f"the Triton kernel takes at most {MOST_TOKENS} tokens, got {tokens}")
    core, groups = _stored(packed, x.device)
    check_tensors("the Triton kernel", {"x": (x, packed.dtype, (tokens, columns))}, device=x.device)
    y = x.new_empty(tokens, rows)
    with torch.cuda.device_of(x):  # Triton launches on the current device, which need not be the layer's
        core_kernel[(triton.cdiv(rows, _ROWS),)](
            x,
            *core,
            y,
            tokens,
            rows,
            columns,
            groups,
            CORE=packed.core,
            ROWS=_ROWS,
            FOURS=_FOURS,
            TOKENS=MOST_TOKENS,
        )
    return y


def unpack_core(packed: PackedLinear) -> Tensor:
    """Make S `(O, I)` in the dtype of the packed floats; an integer times its scale is rounded to it, as in `PackedLinear.unpack`.

    Args:
        packed: a valid layer (`PackedLinear.validate`) on a CUDA device.
    """
    rows, columns = packed.shape
    dense = packed.a.new_empty(rows, columns)
    core, groups = _stored(packed, dense.device)
    with torch.cuda.device_of(dense):
        unpack_kernel[(triton.cdiv(rows, _ROWS), triton.cdiv(columns // 4, _FOURS))](
            *core,
            dense,
            rows,
            columns,
            groups,
            CORE=packed.core,
            ROWS=_ROWS,
            FOURS=_FOURS,
        )
    return dense


def _stored(packed: PackedLinear, device: torch.device) -> tuple[tuple[Tensor, Tensor, Tensor], int]:
    """Values, bitmask and scales as the kernels read them, and the number of scales a row.

    Raises TypeError where one is on another device, or has a dtype or shape that the kernels would take for another.
    """
    (rows, columns), dtype = packed.shape, packed.dtype
    scale = packed.a if packed.scale is None else packed.scale  # without scales any pointer will do
    groups = 1 if packed.scale is None else scale.shape[1]
    values, bitmask, scale = packed.values.contiguous(), packed.bitmask.contiguous(), scale.contiguous()
    stored = {"float": dtype, "int8": torch.int8, "int4": torch.int32}[packed.core]
    wanted = {
        "values": (values, stored, tuple(values.shape)),  # from which the layer's shape follows
        "bitmask": (bitmask, torch.uint8, (rows, columns // 8)),
    }
    if packed.scale is not None:
        wanted["scale"] = (scale, dtype, (rows, groups))
    check_tensors("the Triton kernel", wanted, device=device)
    return (values, bitmask, scale), groups


# Triton reads annotations as code, and knows none but constexpr.
@triton.jit  # type: ignore[untyped-decorator]
def _groups_of_four(  # type: ignore[no-untyped-def]
    values,
    bitmask,
    scale,
    row_start,
    start,
    columns,
    groups,
    CORE: tl.constexpr,
    ROWS: tl.constexpr,
    FOURS: tl.constexpr,
):
    """First and second kept values of groups of four from `start` on, `(ROWS, FOURS)` in float32, and their bits."""
    kept, fours = columns // 2, columns // 4
    four = start + tl.arange(0, FOURS)
    inside = (four < fours)[None, :]
    if CORE == "int4":
        word = tl.load(values + row_start * (kept // 8) + (four // 4)[None, :], mask=inside, other=0)
        shift = (four % 4 * 8)[None, :]
        first = (((word >> shift) & 15) - 8).to(tl.float32)
        second = (((word >> (shift + 4)) & 15) - 8).to(tl.float32)
    else:
        index = 2 * start + tl.arange(0, 2 * FOURS)
        pairs = tl.load(values + row_start * kept + index[None, :], mask=(index < kept)[None, :], other=0)
        first, second = tl.split(tl.reshape(pairs.to(tl.float32), (ROWS, FOURS, 2)))
    if CORE != "float":
        place = (2 * four // (kept // groups))[None, :]
        factor = tl.load(scale + row_start * groups + place, mask=inside, other=0).to(tl.float32)
        first, second = first * factor, second * factor
    byte = tl.load(bitmask + row_start * (columns // 8) + (four // 2)[None, :], mask=inside, other=0).to(tl.int32)
    return first, second, (byte >> (four % 2 * 4)[None, :]) & 15


@triton.jit  # type: ignore[untyped-decorator]
def unpack_kernel(  # type: ignore[no-untyped-def]
    values,
    bitmask,
    scale,
    core,
    rows,
    columns,
    groups,
    CORE: tl.constexpr,
    ROWS: tl.constexpr,
    FOURS: tl.constexpr,
) -> None:
    """One program writes ROWS rows and FOURS groups of four columns of the core."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    start = tl.program_id(1) * FOURS
    row_start = tl.minimum(row, rows - 1).to(tl.int64)[:, None]
    first, second, nibble = _groups_of_four(
        values, bitmask, scale, row_start, start, columns, groups, CORE, ROWS, FOURS
    )
    low = nibble & -nibble  # where the first kept value stands; the second stands in the other bit
    high = nibble ^ low
    w0 = tl.where(low == 1, first, 0.0)
    w1 = tl.where(low == 2, first, tl.where(high == 2, second, 0.0))
    w2 = tl.where(low == 4, first, tl.where(high == 4, second, 0.0))
    w3 = tl.where(high == 8, second, 0.0)
    tile = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (ROWS, 4 * FOURS))
    column = 4 * start + tl.arange(0, 4 * FOURS)
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(core + row.to(tl.int64)[:, None] * columns + column[None, :], tile.to(core.dtype.element_ty), mask=mask)


@triton.jit  # type: ignore[untyped-decorator]
def core_kernel(  # type: ignore[no-untyped-def]
    x,
    values,
    bitmask,
    scale,
    y,
    tokens,
    rows,
    columns,
    groups,
    CORE: tl.constexpr,
    ROWS: tl.constexpr,
    FOURS: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """One program computes ROWS rows of `y` `(T, O)`; all tensors are contiguous, `groups` is the number of scales a row.

    A step takes FOURS groups of four columns. Each group has two kept values; the weight of its column j is the first of
    them, the second or none, so four products, one for each j, take in all columns and nothing is gathered.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    token = tl.arange(0, TOKENS)
    fours = columns // 4
    row_start = tl.minimum(row, rows - 1).to(tl.int64)[:, None]  # rows past the end repeat the last and are not stored
    total = tl.zeros((ROWS, TOKENS), dtype=tl.float32)
    for start in range(0, fours, FOURS):
        first, second, nibble = _groups_of_four(
            values, bitmask, scale, row_start, start, columns, groups, CORE, ROWS, FOURS
        )
        four = start + tl.arange(0, FOURS)
        before = tl.zeros_like(nibble)  # kept values of the group to the left of column j
        for j in tl.static_range(4):
            bit = (nibble >> j) & 1
            weight = tl.where(bit == 1, tl.where(before == 0, first, second), 0.0).to(x.dtype.element_ty)
            place_x = token[None, :] * columns + 4 * four[:, None] + j
            part = tl.load(x + place_x, mask=(four < fours)[:, None] & (token < tokens)[None, :], other=0)
            total = tl.dot(weight, part, total, input_precision="ieee")
            before += bit
    where = token[None, :] * rows + row[:, None]
    tl.store(y + where, total.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (token < tokens)[None, :])
