"""One Gauss-Seidel sweep over every group of the 2:4 core, masks included (see `docs/solver.md`).

For block (j, k), with G_A = A_jᵀA_j, G_B = B_kB_kᵀ and P = A_jᵀ E B_kᵀ, row r, group g with current values s:

    c = P[r, g] + G_A[r,r] · s · G_B[g,g]            keep the mask m with the largest c_mᵀ G_B[m,m]⁻¹ c_m
    s ← G_B[m,m]⁻¹ c_m / G_A[r,r],   P[r, :] −= G_A[r,r] · Δ · G_B[g, :],   P[r', :] −= G_A[r',r] · Δ_row · G_B

Blocks are independent, so they are batched here and split over threads in the compiled kernel: bits never depend on it.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from armor_recipes.solver.patterns import GROUP, PAIRS

_FIRST = [pair[0] for pair in PAIRS]
_SECOND = [pair[1] for pair in PAIRS]
#: A 2x2 minor with a determinant below this share of its diagonal product counts as singular: its mask offers nothing.
_SINGULAR = 1e-6
#: Entries of S below which starting another thread costs more than it saves.
_WORTH_A_THREAD = 1 << 16


@dataclass(slots=True)
class SweepProblem:
    """What a sweep reads and writes, cut in blocks: `correlation`, `core` `(J, K, b_o, b_i)`, `index` uint8 `(J, K, b_o, b_i/4)`.

    `gram_a` `(J, b_o, b_o)`, `gram_b` `(K, b_i, b_i)`. `correlation`, `core` and `index` are changed in place.
    """

    correlation: Tensor
    core: Tensor
    index: Tensor
    gram_a: Tensor
    gram_b: Tensor
    fixed_mask: bool


def native_available() -> bool:
    """Whether the compiled sweep was built; without it the torch sweep gives the same result up to rounding."""
    return _native_sweep() is not None


def sweep(problem: SweepProblem, *, native: bool | None = None) -> None:
    """Run one sweep in place. `native=None` takes the compiled kernel for contiguous float32 CPU tensors when it was built."""
    eligible = problem.core.dtype == torch.float32 and problem.core.device.type == "cpu"
    if native is None:
        native = eligible and native_available()
    inverses = pair_inverses(problem.gram_b)
    if native:
        _sweep_native(problem, inverses)
    else:
        _sweep_torch(problem, inverses)


def pair_inverses(gram_b: Tensor) -> Tensor:
    """The six 2×2 inverses of each group's Gram matrix: `(K, b_i/4, 6, 3)` as (aa, ab, bb); zero where singular."""
    blocks, size, _ = gram_b.shape
    groups = gram_b.reshape(blocks, size // GROUP, GROUP, size // GROUP, GROUP)
    diagonal = groups.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2)
    aa, bb = diagonal[..., _FIRST, _FIRST], diagonal[..., _SECOND, _SECOND]
    ab = diagonal[..., _FIRST, _SECOND]
    determinant = aa * bb - ab * ab
    regular = determinant > _SINGULAR * aa * bb
    scale = torch.where(regular, determinant, torch.ones_like(determinant)).reciprocal() * regular
    return torch.stack((bb * scale, -ab * scale, aa * scale), dim=-1).contiguous()


def _sweep_torch(problem: SweepProblem, inverses: Tensor) -> None:
    """The reference: one row and group at a time, batched over all blocks."""
    rows, groups = problem.core.shape[2], problem.core.shape[3] // GROUP
    for row in range(rows):
        pivot = problem.gram_a[:, row, row][:, None, None].clamp(min=0)
        shift = torch.zeros_like(problem.core[:, :, row])
        for group in range(groups):
            _solve_group(problem, inverses[:, group], row, group, pivot, shift)
        below = problem.gram_a[:, row + 1 :, row]
        problem.correlation[:, :, row + 1 :] -= below[:, None, :, None] * shift[:, :, None, :]


def _solve_group(problem: SweepProblem, inverses: Tensor, row: int, group: int, pivot: Tensor, shift: Tensor) -> None:
    """Solve one group of every block exactly over its masks; `shift` accumulates Δ_row · G_B."""
    columns = slice(group * GROUP, (group + 1) * GROUP)
    gram = problem.gram_b[:, columns]
    s = problem.core[:, :, row, columns]
    share = (s[..., None] * gram[None, :, :, columns]).sum(-2)
    c = problem.correlation[:, :, row, columns] + pivot * (share - shift[..., columns])
    first, second = c[..., _FIRST], c[..., _SECOND]
    v1 = inverses[..., 0] * first + inverses[..., 1] * second
    v2 = inverses[..., 1] * first + inverses[..., 2] * second
    score = v1 * first + v2 * second
    current = problem.index[:, :, row, group].long()
    best = current if problem.fixed_mask else score.argmax(-1)
    chosen = best[..., None]
    safe = torch.where(pivot > 0, pivot, torch.ones_like(pivot))
    table = torch.tensor([_FIRST, _SECOND], device=best.device)
    new = torch.zeros_like(s)
    new.scatter_(-1, table[0][best][..., None], v1.gather(-1, chosen) / safe)
    new.scatter_(-1, table[1][best][..., None], v2.gather(-1, chosen) / safe)
    now = (s * (pivot * share - 2 * c)).sum(-1)
    better = (-score.gather(-1, chosen) / safe)[..., 0] < now
    better &= (pivot > 0)[..., 0]
    delta = torch.where(better[..., None], new - s, torch.zeros_like(s))
    problem.core[:, :, row, columns] = torch.where(better[..., None], new, s)
    problem.index[:, :, row, group] = torch.where(better, best, current).to(torch.uint8)
    shift += (delta[..., None] * gram).sum(-2)


@functools.cache
def _native_sweep() -> Callable[..., None] | None:
    """The compiled kernel's entry point, or None where the extension was not built."""
    spec = importlib.util.find_spec("armor_recipes.solver._native")
    if spec is None or spec.origin is None:
        return None
    function: Any = ctypes.CDLL(spec.origin).armor_sweep
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_int64] * 6
    return function  # type: ignore[no-any-return]


def _sweep_native(problem: SweepProblem, inverses: Tensor) -> None:
    """Hand the blocks to the compiled kernel, split over `torch.get_num_threads()` threads."""
    function = _native_sweep()
    tensors = (problem.correlation, problem.core, problem.index, problem.gram_a, problem.gram_b, inverses)
    if function is None or not all(t.is_contiguous() for t in tensors):
        raise RuntimeError("the compiled sweep needs its extension and contiguous tensors")
    row_blocks, column_blocks, rows, width = problem.core.shape
    total = row_blocks * column_blocks
    pointers = [t.data_ptr() for t in tensors]
    threads = max(1, min(torch.get_num_threads(), total, problem.core.numel() // _WORTH_A_THREAD))
    bounds = [total * i // threads for i in range(threads + 1)]

    scratch = torch.empty(threads, width)

    def run(part: int) -> None:
        begin, end, fixed = bounds[part], bounds[part + 1], int(problem.fixed_mask)
        function(*pointers, scratch[part].data_ptr(), column_blocks, rows, width, begin, end, fixed)

    if threads == 1:
        run(0)
        return
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, range(threads)))
