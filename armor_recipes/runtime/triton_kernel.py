"""The Triton kernels of the backend `cuda`: block-diagonal products, `S x` for a few tokens, and S itself.

| kernel | computes | reads |
|---|---|---|
| `factor_kernel` | `A y + bias` or `B x`, for B also in 8 bits with a scale a token | the factor, and x once (twice for 8 bits) |
| `core_kernel` | `S x` for up to 16 tokens; `A S x` where a program's rows are a block of A | the core as `fragments` orders it |
| `unpack_kernel` | S | the core as it is stored |

Importing this module imports Triton, so `armor_recipes.runtime.cuda` does it when a kernel is first needed. With
TRITON_INTERPRET=1 set before, Triton's interpreter runs them on CPU tensors, which is how they are tested without a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.compute import check_tensors
from armor_recipes.runtime.cuda import MOST_TOKENS
from armor_recipes.runtime.fragments import COLUMNS, ROWS, Fragments
from armor_recipes.runtime.tuning import CorePlan, FactorPlan, core_plan, factor_plan

#: Tile of `unpack_kernel`: rows, and groups of four columns. Not tuned on a GPU.
_ROWS, _FOURS = 16, 64
#: Columns of a block of a factor that a step multiplies.
_INNER = 64
#: Products and sums may be one operation, as they always could; Triton is about to change its default, and says so in each process.
_FUSE = {"enable_fp_fusion": True}
_EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


def apply_factor(
    x: Tensor, factor: Tensor, bias: Tensor | None = None, *, splits: int = 1, plan: FactorPlan | None = None
) -> Tensor:
    """Compute `F x + bias` `(T, C)` for F block-diagonal, summed in float32 and rounded once.

    Args:
        x: `(T, C)` in F's dtype, or `(splits, T, C)` float32, whose sum over the first dimension, taken in its order, is rounded
            to F's dtype first.
        factor: F `(C/b, b, b)`.
        bias: `(C,)` in F's dtype, or None.
        splits: how many parts x is of.
        plan: how to launch; None takes what was measured on this card, or else the default.
    """
    (tokens, columns), size = x.shape[-2:], factor.shape[1]
    y = factor.new_empty(tokens, columns)
    wanted = (torch.float32, (splits, tokens, columns)) if splits > 1 else (factor.dtype, (tokens, columns))
    parts = {"x": (x, *wanted), "the factor": (factor, factor.dtype, (columns // size, size, size))}
    if bias is not None:
        parts["bias"] = (bias, factor.dtype, (columns,))
    check_tensors("the Triton kernel", parts, device=factor.device)
    plan = plan or factor_plan(factor, tokens)
    blocks = columns // size * triton.cdiv(size, plan.columns)
    if tokens:
        _launch_factor((blocks, triton.cdiv(tokens, plan.tokens)), x, factor, bias, y, y, splits, "", plan)
    return y


def apply_factor_in_8_bits(
    x: Tensor, factor: Tensor, numbers: str, *, plan: FactorPlan | None = None
) -> tuple[Tensor, Tensor]:
    """Compute `B x` as 8-bit numbers `(T, I)` with one scale a token `(T,)` float32: what `round_activations` rounds to.

    A program takes all blocks of its tokens, twice: for the largest entry, and to write. Bx itself is never stored.

    Args:
        x: `(T, I)` in the factor's dtype.
        factor: B `(I/b, b, b)`.
        numbers: `int8`, or `fp8` (float8_e4m3fn, which a GPU of compute capability 8.9 and above has).
        plan: how to launch; None takes the default.
    """
    (tokens, columns), size = x.shape, factor.shape[1]
    y, scale = x.new_empty(tokens, columns, dtype=_EIGHT_BITS[numbers]), x.new_empty(tokens, dtype=torch.float32)
    parts = {
        "x": (x, factor.dtype, (tokens, columns)),
        "the factor": (factor, factor.dtype, (columns // size, size, size)),
    }
    check_tensors("the Triton kernel", parts, device=factor.device)
    plan = plan or FactorPlan(min(128, triton.next_power_of_2(size)), 16, 4)
    if tokens:
        _launch_factor((1, triton.cdiv(tokens, plan.tokens)), x, factor, None, y, scale, 1, numbers, plan)
    return y, scale


def _launch_factor(
    grid: tuple[int, int],
    x: Tensor,
    factor: Tensor,
    bias: Tensor | None,
    y: Tensor,
    scale: Tensor,
    splits: int,
    numbers: str,
    plan: FactorPlan,
) -> None:
    blocks, size, _ = factor.shape
    with torch.cuda.device_of(factor):  # Triton launches on the current device, which need not be the layer's
        factor_kernel[grid](
            x,
            factor,
            factor if bias is None else bias,
            y,
            scale,
            x.shape[-2],
            blocks,
            size,
            SPLITS=splits,
            NUMBERS=numbers,
            BIAS=bias is not None,
            OUT=plan.columns,
            INNER=min(_INNER, max(16, triton.next_power_of_2(size))),
            TOKENS=plan.tokens,
            num_warps=plan.warps,
            num_stages=2 if splits > 1 else 3,  # parts of a sum are many loads, which shared memory has to hold
            **_FUSE,
        )


def run_core(x: Tensor, core: Fragments, packed: PackedLinear, plan: CorePlan | None = None) -> Tensor:
    """Compute `S x` of a few tokens, in as many parts as the plan has; summed in float32.

    An integer times the scale of its group is rounded to x's dtype first, as the backend `reference` does; a scale of a whole row
    multiplies its finished sum.

    Args:
        x: `(T, I)` in the dtype of the packed floats, bfloat16 or float16; T at most MOST_TOKENS, on the layer's CUDA device.
        core: `lay_out(packed)`.
        packed: a valid layer (`PackedLinear.validate`).
        plan: how to launch; None takes what was measured on this card, or else the default.

    Returns:
        `(T, O)` in x's dtype where the plan does not split columns (with A applied where it fuses A), else the parts of the
        sum `(splits, T, O)` float32.
    """
    tokens, (rows, columns) = x.shape[0], packed.shape
    if tokens > MOST_TOKENS:
        raise TypeError(f"the Triton kernel takes at most {MOST_TOKENS} tokens, got {tokens}")
    down, across = triton.cdiv(rows, ROWS), triton.cdiv(columns, COLUMNS)
    wanted = {
        "x": (x, packed.dtype, (tokens, columns)),
        "the core": (core.words, torch.int32, (down, across, core.words.shape[2])),
        "A": (packed.a, packed.dtype, tuple(packed.a.shape)),
    }
    if core.scale is not None:
        wanted["scale"] = (core.scale, packed.dtype, (down, across, 8, 2 * core.parts) if core.parts else (rows, 1))
    check_tensors("the Triton kernel", wanted, device=x.device)
    plan = plan or core_plan(packed, tokens)
    y = x.new_empty(tokens, rows) if plan.splits == 1 else x.new_empty(plan.splits, tokens, rows, dtype=torch.float32)
    if not tokens:
        return y
    with torch.cuda.device_of(x):
        core_kernel[(triton.cdiv(down, plan.tiles), plan.splits)](
            x,
            core.words,
            packed.a if core.scale is None else core.scale,
            packed.a,
            y,
            tokens,
            rows,
            columns,
            triton.cdiv(across, plan.splits),
            CORE=packed.core,
            SCALE=("" if core.scale is None else "rows") if core.parts == 0 else "groups",
            PARTS=core.parts,
            FUSED=plan.fused,
            TILES=plan.tiles,
            TOKENS=8 if tokens <= 8 else 16,
            num_warps=1,
            num_stages=plan.stages,
            **_FUSE,
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
            **_FUSE,
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


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def factor_kernel(  # type: ignore[no-untyped-def]
    x,
    factor,
    bias,
    y,
    scale,
    tokens,
    blocks,
    size,
    SPLITS: tl.constexpr,
    NUMBERS: tl.constexpr,
    BIAS: tl.constexpr,
    OUT: tl.constexpr,
    INNER: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """A program takes TOKENS tokens, and OUT columns of a block at a time: one such piece, or with NUMBERS all of them, twice."""
    dtype: tl.constexpr = factor.dtype.element_ty
    LIMIT: tl.constexpr = 127.5 if NUMBERS == "int8" else 448.0
    pieces, columns = tl.cdiv(size, OUT), blocks * size
    token = tl.program_id(1) * TOKENS + tl.arange(0, TOKENS)
    start = token.to(tl.int64)[:, None] * columns
    largest = tl.zeros((TOKENS,), dtype=tl.float32)
    for write in tl.static_range(0 if NUMBERS != "" else 1, 2):
        step = tl.where(largest > 0, largest / LIMIT, 1.0)
        for place in range(tl.program_id(0), blocks * pieces, tl.num_programs(0)):
            block, i = place // pieces, place % pieces * OUT + tl.arange(0, OUT)
            total = tl.zeros((TOKENS, OUT), dtype=tl.float32)
            for inner in range(0, size, INNER):
                j = inner + tl.arange(0, INNER)
                inside = (token < tokens)[:, None] & (j < size)[None, :]
                at = start + block * size + j[None, :]
                part = tl.load(x + at, mask=inside, other=0)
                for split in tl.static_range(1, SPLITS):
                    part += tl.load(x + split * tokens * columns + at, mask=inside, other=0)
                held = factor + block.to(tl.int64) * size * size + i[None, :] * size + j[:, None]
                weight = tl.load(held, mask=(i < size)[None, :] & (j < size)[:, None], other=0)
                total = tl.dot(part.to(dtype), weight, total, input_precision="ieee")
            if BIAS:
                total += tl.load(bias + block * size + i, mask=i < size, other=0).to(tl.float32)[None, :]
            found = total.to(dtype)
            at = y + start + block * size + i[None, :]
            mask = (token < tokens)[:, None] & (i < size)[None, :]
            if NUMBERS == "":
                tl.store(at, found, mask=mask)
            elif not write:
                largest = tl.maximum(largest, tl.max(tl.abs(found.to(tl.float32)), 1))
            elif NUMBERS == "int8":
                whole = (
                    found.to(tl.float32) / step[:, None] + 12582912.0 - 12582912.0
                )  # 1.5 · 2^23: to the nearest even
                tl.store(at, tl.minimum(tl.maximum(whole, -128.0), 127.0).to(tl.int8), mask=mask)
            else:
                near = tl.minimum(tl.maximum(found.to(tl.float32) / step[:, None], -LIMIT), LIMIT)
                tl.store(at, near.to(y.dtype.element_ty), mask=mask)
        if NUMBERS != "" and write:
            tl.store(scale + token, step, mask=token < tokens)


@triton.jit  # type: ignore[untyped-decorator]
def _number(code, SECOND: tl.constexpr, dtype: tl.constexpr, CORE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The first or second kept value of each group."""
    if CORE == "float":
        return ((code >> 16) if SECOND else code).to(tl.int16).to(dtype, bitcast=True)
    elif CORE == "int8":  # noqa: RET505 - Triton compiles what stands behind a return, too
        return ((code << (16 if SECOND else 24)) >> 24).to(tl.float32)
    else:
        return ((code >> (4 if SECOND else 0)) & 15).to(tl.float32) - 8.0


@triton.jit  # type: ignore[untyped-decorator]
def _weights(  # type: ignore[no-untyped-def]
    words,
    scale,
    tile,
    dtype: tl.constexpr,
    CORE: tl.constexpr,
    SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
):
    """Records `tile` `(TILES, 1)` of the core as `(16 · TILES, 256)`, within 16 columns in the order of `_alike`.

    All that is done here renames registers or stays within a lane; dimensions as `fragments` names them: h, g, q, f, c.
    """
    PAIRS: tl.constexpr = 1 if CORE == "float" else (2 if CORE == "int8" else 4)
    FOURS: tl.constexpr = 8 // PAIRS
    record = words + tile * (128 * (1 + FOURS))
    mask = tl.reshape(tl.load(record + tl.arange(0, 128)[None, :]), (TILES, 8, 4, 4))
    mask = tl.permute(mask, (0, 1, 3, 2))[:, None, :, :, None, :]
    h, f = tl.arange(0, 2)[None, :, None, None, None, None], tl.arange(0, 4)[None, None, None, None, :, None]
    kept = tl.reshape(mask >> (16 * h + 4 * f), (16 * TILES, 64))
    code = tl.load(record + 128 + tl.arange(0, 128 * FOURS)[None, :])
    code = tl.permute(tl.reshape(code, (TILES, FOURS, 8, 4, 4)), (0, 2, 3, 1, 4))
    code = tl.permute(tl.reshape(code, (TILES, 8, 4, 4, 2, 4 // PAIRS)), (0, 4, 1, 3, 5, 2))
    if PAIRS > 1:
        shift = 32 // PAIRS * tl.arange(0, PAIRS)
        code = tl.reshape(code, (TILES * 256 // PAIRS, 1, 4)) >> shift[None, :, None]
    code = tl.reshape(code, (16 * TILES, 64))
    first, second = _number(code, False, dtype, CORE), _number(code, True, dtype, CORE)
    if SCALE == "groups":
        g, c = tl.arange(0, 8)[None, :, None, None], tl.arange(0, 4)[None, None, :, None]
        at = 2 * PARTS * g + tl.arange(0, 2 * PARTS)[None, None, None, :] + 0 * c
        rate = tl.reshape(tl.load(scale + tile[:, :, None, None] * (16 * PARTS) + at), (TILES, 8, 4, 2, 4, PARTS // 4))
        rate = tl.permute(rate, (0, 3, 1, 4, 5, 2)).to(tl.float32)
        rate = tl.reshape(tl.broadcast_to(rate, (TILES, 2, 8, 4, 4, 4)), (16 * TILES, 64))
        first, second = first * rate, second * rate
    first, second = first.to(dtype), second.to(dtype)
    zero = tl.zeros_like(first)
    w0 = tl.where((kept & 1) != 0, first, zero)
    w1 = tl.where((kept & 2) != 0, tl.where((kept & 1) != 0, second, first), zero)
    w2 = tl.where((kept & 4) != 0, tl.where((kept & 8) != 0, first, second), zero)
    w3 = tl.where((kept & 8) != 0, second, zero)
    low, high = (
        tl.reshape(tl.join(w0, w1), (16 * TILES, 16, 8)),
        tl.reshape(tl.join(w2, w3), (16 * TILES, 16, 8)),
    )
    return tl.reshape(tl.permute(tl.join(low, high), (0, 1, 3, 2)), (16 * TILES, 256))


@triton.jit  # type: ignore[untyped-decorator]
def _alike(x, TOKENS: tl.constexpr):  # type: ignore[no-untyped-def]
    """256 columns of x, within 16 in the order in which a lane's four weights stand in two registers."""
    return tl.reshape(tl.permute(tl.reshape(x, (16, 4, 2, 2, TOKENS)), (0, 2, 1, 3, 4)), (256, TOKENS))


@triton.jit(do_not_specialize=["tokens", "piece"])  # type: ignore[untyped-decorator]
def core_kernel(  # type: ignore[no-untyped-def]
    x,
    words,
    scale,
    a,
    y,
    tokens,
    rows,
    columns,
    piece,
    CORE: tl.constexpr,
    SCALE: tl.constexpr,
    PARTS: tl.constexpr,
    FUSED: tl.constexpr,
    TILES: tl.constexpr,
    TOKENS: tl.constexpr,
) -> None:
    """A program, which is one warp, computes 16 · TILES rows from `piece` records side by side; all tensors are contiguous."""
    dtype: tl.constexpr = a.dtype.element_ty
    across = tl.cdiv(columns, 256)
    row = tl.program_id(0) * (16 * TILES) + tl.arange(0, 16 * TILES)
    last = tl.cdiv(rows, 16) - 1  # tiles past the end repeat the last one, and are not stored
    tile = tl.minimum(tl.program_id(0) * TILES + tl.arange(0, TILES), last).to(tl.int64)[:, None]
    token = tl.arange(0, TOKENS)
    total = tl.zeros((16 * TILES, TOKENS), dtype=tl.float32)
    first = tl.program_id(1) * piece
    for step in range(first, tl.minimum(first + piece, across)):
        weights = _weights(words, scale, tile * across + step, dtype, CORE, SCALE, PARTS, TILES)
        column = 256 * step + tl.arange(0, 256)
        inside = (column < columns)[:, None] & (token < tokens)[None, :]
        part = tl.load(x + token[None, :] * columns + column[:, None], mask=inside, other=0)
        total = tl.dot(weights, _alike(part, TOKENS), total)
    if SCALE == "rows":
        total *= tl.load(scale + row, mask=row < rows, other=0).to(tl.float32)[:, None]
    if FUSED:
        i = tl.arange(0, 16 * TILES)
        factor = tl.load(a + row.to(tl.int64)[:, None] * (16 * TILES) + i[None, :])
        total = tl.dot(factor, total.to(dtype))
    at = (tl.program_id(1) * tokens + token[None, :]) * rows + row[:, None]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (token < tokens)[None, :])
