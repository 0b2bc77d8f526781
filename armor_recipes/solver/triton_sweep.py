"""The sweep of `armor_recipes.solver.sweep` on a GPU: 2:4 in float32, one program a block, as a Triton kernel.

Importing this module imports Triton, so `sweep` does it when it is first needed. With TRITON_INTERPRET=1 set before, Triton's
interpreter runs it on CPU tensors, which is how it is tested without a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from armor_recipes.solver.sweep import SweepProblem, check_problem

#: Rows above that are taken off the correlation at once.
_ABOVE = 16


def sweep_blocks(problem: SweepProblem, inverses: Tensor) -> None:
    """Run one sweep in place over contiguous float32 blocks of a 2:4 core; `problem.correlation` is used up.

    The operations are those of the torch form, summed in another order: row r reads what the rows above changed when its turn
    comes (Δ_row · G_B is kept in the place of their correlations), and no row is written but its own.
    """
    check_problem("the Triton sweep", problem, inverses, device=problem.core.device)
    tensors = (problem.correlation, problem.core, problem.index, problem.gram_a, problem.gram_b, inverses)
    row_blocks, column_blocks, rows, width = problem.core.shape
    with torch.cuda.device_of(problem.core):  # Triton launches on the current device, which need not be the tensors'
        sweep_kernel[(row_blocks * column_blocks,)](
            *tensors,
            column_blocks,
            rows,
            width,
            FIXED=problem.fixed_mask,
            WIDTH=triton.next_power_of_2(width),
            ABOVE=_ABOVE,
            num_warps=1,
        )


# Triton reads annotations as code, and knows none but constexpr.
@triton.jit  # type: ignore[untyped-decorator]
def _offer(  # type: ignore[no-untyped-def]
    inverse,
    a,
    b,
    old,
    best,
    number,
    w0,
    w1,
    w2,
    w3,
    M: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    FIXED: tl.constexpr,
):
    """Mask M keeps entries A and B, whose correlations are a and b: its score and values where they are the best so far."""
    first_row, both, second_row = tl.load(inverse + 4 * M), tl.load(inverse + 4 * M + 1), tl.load(inverse + 4 * M + 3)
    first = first_row * a + both * b
    second = both * a + second_row * b
    score = first * a + second * b
    take = score > best
    if FIXED:
        take = take & (old == M)
    best = tl.where(take, score, best)
    number = tl.where(take, M, number)
    w0 = tl.where(take, first if A == 0 else 0.0, w0)
    w1 = tl.where(take, first if A == 1 else (second if B == 1 else 0.0), w1)
    w2 = tl.where(take, first if A == 2 else (second if B == 2 else 0.0), w2)
    w3 = tl.where(take, second if B == 3 else 0.0, w3)
    return best, number, w0, w1, w2, w3


@triton.jit
def _entry(vector, column, at):  # type: ignore[no-untyped-def]
    """One number of a vector that the program's threads hold."""
    return tl.sum(tl.where(column == at, vector, 0.0), axis=0)


@triton.jit  # type: ignore[untyped-decorator]
def _solve_group(  # type: ignore[no-untyped-def]
    c0, c1, c2, c3, s0, s1, s2, s3, old, pivot, gram, width, inverse, FIXED: tl.constexpr
):
    """Best values and mask of one group: c is its correlation, s its values, `gram` and `inverse` where its matrices stand."""
    g00, g01, g02, g03 = tl.load(gram), tl.load(gram + 1), tl.load(gram + 2), tl.load(gram + 3)
    g11, g12, g13 = tl.load(gram + width + 1), tl.load(gram + width + 2), tl.load(gram + width + 3)
    g22, g23, g33 = tl.load(gram + 2 * width + 2), tl.load(gram + 2 * width + 3), tl.load(gram + 3 * width + 3)
    share0 = pivot * (s0 * g00 + s1 * g01 + s2 * g02 + s3 * g03)
    share1 = pivot * (s0 * g01 + s1 * g11 + s2 * g12 + s3 * g13)
    share2 = pivot * (s0 * g02 + s1 * g12 + s2 * g22 + s3 * g23)
    share3 = pivot * (s0 * g03 + s1 * g13 + s2 * g23 + s3 * g33)
    c0, c1, c2, c3 = c0 + share0, c1 + share1, c2 + share2, c3 + share3
    now = s0 * (2 * c0 - share0) + s1 * (2 * c1 - share1) + s2 * (2 * c2 - share2) + s3 * (2 * c3 - share3)
    best, number, w0, w1, w2, w3 = now * 0.0 - 1.0, old, s0, s1, s2, s3
    best, number, w0, w1, w2, w3 = _offer(inverse, c0, c1, old, best, number, w0, w1, w2, w3, 0, 0, 1, FIXED)
    best, number, w0, w1, w2, w3 = _offer(inverse, c0, c2, old, best, number, w0, w1, w2, w3, 1, 0, 2, FIXED)
    best, number, w0, w1, w2, w3 = _offer(inverse, c0, c3, old, best, number, w0, w1, w2, w3, 2, 0, 3, FIXED)
    best, number, w0, w1, w2, w3 = _offer(inverse, c1, c2, old, best, number, w0, w1, w2, w3, 3, 1, 2, FIXED)
    best, number, w0, w1, w2, w3 = _offer(inverse, c1, c3, old, best, number, w0, w1, w2, w3, 4, 1, 3, FIXED)
    best, number, w0, w1, w2, w3 = _offer(inverse, c2, c3, old, best, number, w0, w1, w2, w3, 5, 2, 3, FIXED)
    better = best / pivot > now
    n0, n1 = tl.where(better, w0 / pivot, s0), tl.where(better, w1 / pivot, s1)
    n2, n3 = tl.where(better, w2 / pivot, s2), tl.where(better, w3 / pivot, s3)
    return n0, n1, n2, n3, tl.where(better, number, old)


@triton.jit  # type: ignore[untyped-decorator]
def sweep_kernel(  # type: ignore[no-untyped-def]
    correlation,
    core,
    index,
    gram_a,
    gram_b,
    inverses,
    column_blocks,
    rows,
    width,
    FIXED: tl.constexpr,
    WIDTH: tl.constexpr,
    ABOVE: tl.constexpr,
) -> None:
    """All rows and groups of one block, in order; shapes are those of `SweepProblem`, `inverses` `(K, b_i/4, 6, 2, 2)`."""
    block = tl.program_id(0).to(tl.int64)
    groups = width // 4
    p = correlation + block * rows * width
    s = core + block * rows * width
    numbers = index + block * rows * groups
    a = gram_a + block // column_blocks * rows * rows
    b = gram_b + block % column_blocks * width * width
    inverse = inverses + block % column_blocks * groups * 24
    column = tl.arange(0, WIDTH)
    inside = column < width
    for r in range(rows):
        pivot = tl.load(a + r * rows + r)
        shift = tl.zeros((WIDTH,), dtype=tl.float32)  # Δ_row · G_B
        if pivot > 0:
            have = tl.load(p + r * width + column, mask=inside, other=0.0)
            for start in range(0, r, ABOVE):
                above = start + tl.arange(0, ABOVE)
                weight = tl.load(a + r * rows + above, mask=above < r, other=0.0)
                kept = (above < r)[:, None] & inside[None, :]
                shifts = tl.load(p + above[:, None] * width + column[None, :], mask=kept, other=0.0)
                have -= tl.sum(weight[:, None] * shifts, axis=0)
            for g in range(groups):
                at = 4 * g
                here = have - pivot * shift
                c0, c1 = _entry(here, column, at), _entry(here, column, at + 1)
                c2, c3 = _entry(here, column, at + 2), _entry(here, column, at + 3)
                own = s + r * width + at
                s0, s1, s2, s3 = tl.load(own), tl.load(own + 1), tl.load(own + 2), tl.load(own + 3)
                old = tl.load(numbers + r * groups + g).to(tl.int32)
                minor, minors = b + at * width + at, inverse + g * 24
                n0, n1, n2, n3, number = _solve_group(
                    c0, c1, c2, c3, s0, s1, s2, s3, old, pivot, minor, width, minors, FIXED
                )
                tl.store(own, n0)
                tl.store(own + 1, n1)
                tl.store(own + 2, n2)
                tl.store(own + 3, n3)
                tl.store(numbers + r * groups + g, number.to(tl.uint8))
                gram = b + at * width + column
                shift += (n0 - s0) * tl.load(gram, mask=inside, other=0.0)
                shift += (n1 - s1) * tl.load(gram + width, mask=inside, other=0.0)
                shift += (n2 - s2) * tl.load(gram + 2 * width, mask=inside, other=0.0)
                shift += (n3 - s3) * tl.load(gram + 3 * width, mask=inside, other=0.0)
        tl.store(p + r * width + column, shift, mask=inside)
        tl.debug_barrier()  # the rows below read it, in another layout
