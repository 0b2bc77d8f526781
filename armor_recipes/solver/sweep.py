"""One Gauss-Seidel sweep over every group of the N:M core, masks included (see `docs/solver.md`).

For block (j, k), with G_A = A_jᵀA_j, G_B = B_kB_kᵀ and P = A_jᵀ E B_kᵀ, row r, group g with current values s:

    c = P[r, g] + G_A[r,r] · s · G_B[g,g]            keep the mask m with the largest c_mᵀ G_B[m,m]⁻¹ c_m
    s ← G_B[m,m]⁻¹ c_m / G_A[r,r],   P[r, :] −= G_A[r,r] · Δ · G_B[g, :],   P[r', :] −= G_A[r',r] · Δ_row · G_B

Blocks are independent, so they are batched here and split over threads in the compiled kernel: bits never depend on it.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from armor_recipes.compute import check_tensors
from armor_recipes.solver.compiled import compiled, over_blocks
from armor_recipes.solver.groups import minor_inverses, solve_group
from armor_recipes.solver.patterns import TWO_OF_FOUR, Pattern, mask_lanes

SweepForm = Literal["native", "triton", "torch"]


@dataclass(slots=True)
class SweepProblem:
    """What a sweep reads and writes, cut in blocks: `correlation`, `core` `(J, K, b_o, b_i)`, `index` `(J, K, b_o, b_i/M)`.

    `gram_a` `(J, b_o, b_o)`, `gram_b` `(K, b_i, b_i)`; b_i is a multiple of M (`join_blocks` makes it one), `index` as
    `mask_to_index` numbers masks. `core` and `index` are changed in place, `correlation` is used up.
    """

    correlation: Tensor
    core: Tensor
    index: Tensor
    gram_a: Tensor
    gram_b: Tensor
    fixed_mask: bool
    pattern: Pattern = TWO_OF_FOUR


def native_available() -> bool:
    """Whether the compiled sweep was built; without it the torch sweep gives the same result up to rounding."""
    return _native_sweep() is not None


@functools.cache
def triton_available() -> bool:
    """Whether Triton is installed; without it a GPU runs the torch sweep, with the same result up to rounding."""
    return importlib.util.find_spec("triton") is not None


def sweep_form(device: str, pattern: Pattern = TWO_OF_FOUR) -> SweepForm:
    """The form that `sweep` takes for float32 tensors on a device type: compiled on a CPU, Triton's on a GPU, else torch's."""
    if device == "cpu" and pattern.has_table and native_available():
        return "native"
    if device == "cuda" and pattern == TWO_OF_FOUR and triton_available():
        return "triton"
    return "torch"


def sweep(problem: SweepProblem, *, native: bool | None = None) -> None:
    """Run one sweep in place.

    `native=None` takes the form that `sweep_form` names, for float32; otherwise the compiled one or torch's, as asked.
    """
    form: SweepForm = "native" if native else "torch"
    if native is None and problem.core.dtype == torch.float32:
        form = sweep_form(problem.core.device.type, problem.pattern)
    inverses = _group_inverses(problem) if problem.pattern.has_table else None
    if form == "native":
        _sweep_native(problem, inverses)
    elif form == "triton":
        _sweep_triton(problem, inverses)
    else:
        _sweep_torch(problem, inverses)


def join_blocks(gram: Tensor, width: int) -> Tensor:
    """Put neighbours of `(K, b, b)` on the diagonals of blocks of `width`, a multiple of b: `(K·b/width, width, width)`.

    So a group that straddles two blocks of B lies in one block of the sweep; the zeros between them change nothing.
    """
    size = gram.shape[-1]
    count = width // size
    joined = gram.new_zeros(gram.shape[0] // count, count, size, count, size)
    lane = torch.arange(count, device=gram.device)
    joined[:, lane, :, lane] = gram.unflatten(0, (-1, count)).transpose(0, 1)
    return joined.reshape(-1, width, width)


def _group_inverses(problem: SweepProblem) -> Tensor:
    """`(K, b_i/M, C, N, N)`: the inverses of every group's minors."""
    gram, size = problem.gram_b, problem.pattern.group
    groups = gram.unflatten(2, (-1, size)).unflatten(1, (-1, size)).diagonal(dim1=1, dim2=3)
    return minor_inverses(groups.movedim(-1, 1), problem.pattern).contiguous()


def _sweep_torch(problem: SweepProblem, inverses: Tensor | None) -> None:
    """The reference: one row and group at a time, batched over all blocks."""
    rows, groups = problem.index.shape[2:]
    for row in range(rows):
        pivot = problem.gram_a[:, row, row][:, None, None].clamp(min=0)
        shift = torch.zeros_like(problem.core[:, :, row])
        for group in range(groups):
            _step(problem, None if inverses is None else inverses[:, group], row, group, pivot, shift)
        below = problem.gram_a[:, row + 1 :, row]
        problem.correlation[:, :, row + 1 :] -= below[:, None, :, None] * shift[:, :, None, :]


def _step(problem: SweepProblem, inverses: Tensor | None, row: int, group: int, pivot: Tensor, shift: Tensor) -> None:
    """Solve one group of every block; `shift` accumulates Δ_row · G_B."""
    size = problem.pattern.group
    columns = slice(group * size, (group + 1) * size)
    gram = problem.gram_b[:, columns]
    old = problem.core[:, :, row, columns].clone()
    problem.core[:, :, row, columns], problem.index[:, :, row, group] = solve_group(
        problem.correlation[:, :, row, columns] - pivot * shift[..., columns],
        gram[:, :, columns],
        old,
        problem.index[:, :, row, group],
        pivot,
        pattern=problem.pattern,
        fixed_mask=problem.fixed_mask,
        inverses=inverses,
    )
    delta = problem.core[:, :, row, columns] - old
    shift += (delta[..., None] * gram).sum(-2)


def _sweep_triton(problem: SweepProblem, inverses: Tensor | None) -> None:
    from armor_recipes.solver.triton_sweep import sweep_blocks  # imports Triton

    if inverses is None:
        raise RuntimeError("the Triton sweep needs groups of four")
    sweep_blocks(problem, inverses)


def check_problem(
    what: str, problem: SweepProblem, inverses: Tensor, *, device: torch.device | Literal["cpu"] = "cpu"
) -> None:
    """Raise TypeError where compiled code would read or write beyond the tensors of `problem`, or take them for others."""
    row_blocks, column_blocks, rows, width = problem.core.shape
    keep, group = problem.pattern.keep, problem.pattern.group
    masks = len(mask_lanes(problem.pattern))
    blocks = (row_blocks, column_blocks, rows)
    single = torch.float32
    check_tensors(
        what,
        {
            "correlation": (problem.correlation, single, (*blocks, width)),
            "core": (problem.core, single, (*blocks, width)),
            "index": (problem.index, torch.uint8, (*blocks, width // group)),
            "gram_a": (problem.gram_a, single, (row_blocks, rows, rows)),
            "gram_b": (problem.gram_b, single, (column_blocks, width, width)),
            "inverses": (inverses, single, (column_blocks, width // group, masks, keep, keep)),
        },
        device=device,
    )
    if device == "cpu" and problem.index.numel() and int(problem.index.max()) >= masks:
        raise TypeError(f"{what} takes numbers of masks below {masks}, got {int(problem.index.max())}")


def _native_sweep() -> Callable[..., None] | None:
    return compiled("armor_sweep", pointers=8, integers=9)


def _sweep_native(problem: SweepProblem, inverses: Tensor | None) -> None:
    """Hand the blocks to the compiled kernel, split over threads."""
    function = _native_sweep()
    if function is None or inverses is None:
        raise RuntimeError("the compiled sweep needs its extension, and groups of at most 8 entries")
    check_problem("the compiled sweep", problem, inverses)
    lanes = torch.tensor(mask_lanes(problem.pattern), dtype=torch.uint8, device="cpu")
    tensors = (problem.correlation, problem.core, problem.index, problem.gram_a, problem.gram_b, inverses, lanes)
    row_blocks, column_blocks, rows, width = problem.core.shape
    pointers = [t.data_ptr() for t in tensors]
    sizes = (column_blocks, rows, width, lanes.shape[1], problem.pattern.group, lanes.shape[0])

    def run(first: int, end: int) -> None:
        scratch = torch.empty(width, dtype=torch.float32, device="cpu")
        function(*pointers, scratch.data_ptr(), *sizes, first, end, int(problem.fixed_mask))

    over_blocks(run, row_blocks * column_blocks, problem.core.numel())
