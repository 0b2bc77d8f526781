"""One pass over the kept values of a rounded core, each the best on its grid given all others (see `docs/solver.md`).

For block (j, k), with G_A = A_jᵀA_j, G_B = B_k G B_kᵀ and P = A_jᵀ (E G) B_kᵀ, row r, column c, value s on a grid of step t:

    s' ← t · nearest((s + P[r,c] / (G_A[r,r] · G_B[c,c])) / t),   Δ = s' − s
    P[r, :] −= G_A[r,r] · Δ · G_B[c, :],   P[r', :] −= G_A[r',r] · Δ_row · G_B

The loss is quadratic in s, so the nearest point of the grid to its minimum is the best: no step raises the loss, and a whole pass
takes as long as a sweep of `exact`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from armor_recipes.compute import check_tensors
from armor_recipes.solver.blockdiag import left_multiply, right_multiply
from armor_recipes.solver.compiled import compiled, over_blocks
from armor_recipes.solver.exact import ExactProblem, from_blocks, residual, to_blocks
from armor_recipes.solver.hessian import HessianProblem, panels
from armor_recipes.solver.result import Factors

LARGEST_FLOAT8 = float(torch.finfo(torch.float8_e4m3fn).max)


@dataclass(frozen=True, slots=True)
class Grid:
    """The numbers that kept values may be: an integer from `low` to `high`, or a float8_e4m3fn, times a scale.

    Attributes:
        scale: float32 `(O, I)`, of each value; 0 where nothing is kept.
        low: smallest number.
        high: largest number.
        float8: numbers are float8_e4m3fn, from −448 to 448, and no integers.
    """

    scale: Tensor
    low: float
    high: float
    float8: bool = False

    def nearest(self, values: Tensor, scale: Tensor) -> Tensor:
        """The nearest numbers to values over their positive scales, float32, of one shape."""
        return nearest_number(values / scale, self.low, self.high, float8=self.float8)


@dataclass(slots=True)
class RoundingPass:
    """What a pass reads and writes, cut in blocks: `correlation`, `core`, `scale` `(J, K, b_o, b_i)`.

    `gram_a` `(J, b_o, b_o)`, `gram_b` `(K, b_i, b_i)`; `core` is changed in place, `correlation` is used up.
    """

    correlation: Tensor
    core: Tensor
    scale: Tensor
    gram_a: Tensor
    gram_b: Tensor
    grid: Grid


def nearest_number(values: Tensor, low: float, high: float, *, float8: bool = False) -> Tensor:
    """The nearest integers from low to high, ties to even, or the nearest float8_e4m3fn; float32, of any shape."""
    if float8:
        return values.clamp(-LARGEST_FLOAT8, LARGEST_FLOAT8).to(torch.float8_e4m3fn).float()
    return values.round().clamp(low, high)


def update_rounded(
    problem: ExactProblem | HessianProblem, factors: Factors, grid: Grid, *, native: bool | None = None
) -> None:
    """One pass over all kept values of S, in the coordinates of the problem; S is replaced. `native`: as in `run_pass`."""
    gram_a = torch.bmm(factors.a.mT, factors.a).contiguous()
    error = residual(problem, factors)
    if isinstance(problem, ExactProblem):
        gram_b = torch.bmm(factors.b, factors.b.mT).contiguous()
        correlation = left_multiply(factors.a.mT, right_multiply(error, factors.b.mT))
        factors.core = _passed(correlation, factors.core, grid, gram_a, gram_b, native)
        return
    core = factors.core.clone()
    for columns, blocks in panels(factors, 1):
        b = factors.b[blocks]
        correlation = left_multiply(factors.a.mT, right_multiply(error @ problem.gram[:, columns], b.mT))
        gram_b = right_multiply(left_multiply(b, problem.gram[columns, columns]), b.mT)[None].contiguous()
        part = Grid(grid.scale[:, columns], grid.low, grid.high, grid.float8)
        passed = _passed(correlation, core[:, columns], part, gram_a, gram_b, native)
        error[:, columns] -= left_multiply(factors.a, right_multiply(passed - core[:, columns], b))
        core[:, columns] = passed
    factors.core = core


def run_pass(work: RoundingPass, *, native: bool | None = None) -> None:
    """Run one pass in place, compiled or in torch as asked.

    `native=None` takes the compiled form for float32 where it was built, on a GPU with the tensors on the processor meanwhile: it
    is one value after the other. Without it torch gives the same up to rounding, slowly.
    """
    if native is None:
        native = work.core.dtype == torch.float32 and native_available()
    if not native:
        _pass_torch(work)
    elif work.core.device.type == "cpu":
        _pass_native(work)
    else:
        tensors = (work.correlation, work.core, work.scale, work.gram_a, work.gram_b)
        correlation, core, scale, gram_a, gram_b = (tensor.cpu() for tensor in tensors)
        here = RoundingPass(correlation, core, scale, gram_a, gram_b, work.grid)
        _pass_native(here)
        work.core.copy_(here.core)


def native_available() -> bool:
    """Whether the compiled pass was built."""
    return _native() is not None


def _passed(
    correlation: Tensor, core: Tensor, grid: Grid, gram_a: Tensor, gram_b: Tensor, native: bool | None
) -> Tensor:
    """The core `(O, I)` after a pass."""
    rows, width = gram_a.shape[-1], gram_b.shape[-1]
    correlations, cores, scales = (to_blocks(part, rows, width) for part in (correlation, core.clone(), grid.scale))
    work = RoundingPass(correlations, cores, scales, gram_a, gram_b, grid)
    run_pass(work, native=native)
    return from_blocks(work.core)


def _pass_torch(work: RoundingPass) -> None:
    """The reference: one value at a time, batched over all blocks."""
    rows, width = work.core.shape[2:]
    for row in range(rows):
        pivot = work.gram_a[:, row, row, None]
        shift = torch.zeros_like(work.core[:, :, row])
        for column in range(width):
            _step(work, row, column, pivot, shift)
        below = work.gram_a[:, row + 1 :, row]
        work.correlation[:, :, row + 1 :] -= below[:, None, :, None] * shift[:, :, None, :]


def _step(work: RoundingPass, row: int, column: int, pivot: Tensor, shift: Tensor) -> None:
    """Round one value of every block; `shift` accumulates Δ_row · G_B."""
    old, scale = work.core[:, :, row, column].clone(), work.scale[:, :, row, column]
    curvature = pivot * work.gram_b[:, column, column]
    free = (scale > 0) & (curvature > 0)
    scale = torch.where(free, scale, 1)
    slope = work.correlation[:, :, row, column] - pivot * shift[..., column]
    wanted = old + slope / torch.where(free, curvature, 1)
    new = torch.where(free, work.grid.nearest(wanted, scale) * scale, old)
    work.core[:, :, row, column] = new
    shift += (new - old)[..., None] * work.gram_b[:, column]


def _native() -> Callable[..., None] | None:
    return compiled("armor_round", pointers=6, integers=8)


def _pass_native(work: RoundingPass) -> None:
    """Hand the blocks to the compiled form, split over threads."""
    function = _native()
    if function is None:
        raise RuntimeError("the compiled pass of rounding needs its extension")
    row_blocks, column_blocks, rows, width = work.core.shape
    _check(work)
    tensors = (work.correlation, work.core, work.scale, work.gram_a, work.gram_b)
    pointers = [tensor.data_ptr() for tensor in tensors]
    sizes = (column_blocks, rows, width, int(work.grid.low), int(work.grid.high), int(work.grid.float8))

    def run(first: int, end: int) -> None:
        scratch = torch.empty(width, dtype=torch.float32, device="cpu")
        function(*pointers, scratch.data_ptr(), *sizes, first, end)

    over_blocks(run, row_blocks * column_blocks, work.core.numel())


def _check(work: RoundingPass) -> None:
    """Raise TypeError where compiled code would read or write beyond the tensors, or take them for others."""
    blocks = tuple(work.core.shape)
    row_blocks, column_blocks, rows, width = blocks
    single = torch.float32
    check_tensors(
        "the compiled pass of rounding",
        {
            "correlation": (work.correlation, single, blocks),
            "core": (work.core, single, blocks),
            "scale": (work.scale, single, blocks),
            "gram_a": (work.gram_a, single, (row_blocks, rows, rows)),
            "gram_b": (work.gram_b, single, (column_blocks, width, width)),
        },
    )
