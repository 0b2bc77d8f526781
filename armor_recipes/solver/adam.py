"""`solver: adam`: our implementation of the paper's method (ARMOR, §3; `docs/solver.md`).

Each iteration takes one joint Adam step on (A, B, S∘M), then draws one group of four in every block with probability
proportional to the L1 norm of its gradient, and solves it exactly over the six masks. The best state is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver.blockdiag import left_multiply, right_multiply, stable_sum
from armor_recipes.solver.patterns import GROUP, PAIRS, index_to_mask, mask_to_index, pair_table
from armor_recipes.solver.result import Factors, StopReason

#: The paper's settings.
LEARNING_RATE = 1e-4
_PATIENCE, _MIN_GAIN = 100, 1e-6


@dataclass(slots=True)
class AdamProblem:
    """Target W̄ `(O, I)`, column weights h `(I,)`, whether masks stay fixed, and the generator that draws groups."""

    target: Tensor
    weights: Tensor
    generator: torch.Generator
    fixed_mask: bool = False


@dataclass(slots=True)
class _State:
    """The iterate, with `t = S·B`, `error = W̄ − A·S·B` and `weighted = error·h` kept current, all `(O, I)` row-major."""

    a: Tensor
    core: Tensor
    b: Tensor
    mask: Tensor
    t: Tensor
    error: Tensor
    weighted: Tensor

    def grid(self, x: Tensor) -> Tensor:
        """View `(O, I)` as `(J, b_o, K, b_i)`."""
        return x.view(self.a.shape[0], self.a.shape[1], self.b.shape[0], self.b.shape[1])


def solve_adam(
    problem: AdamProblem, factors: Factors, *, iterations: int, record: Callable[[float], None]
) -> tuple[Factors, StopReason]:
    """Run the paper's iteration; `record` gets the best weighted squared error after each. Returns the best factors seen."""
    state = _start(problem, factors)
    optimizer = torch.optim.Adam([state.a, state.core, state.b], lr=LEARNING_RATE, fused=True)
    best = reference = _loss(state)
    kept, since = factors, 0
    for _ in range(iterations):
        gradient = _adam_step(problem, state, optimizer)
        _solve_drawn_groups(problem, state, _draw(problem, state, gradient))
        loss = _loss(state)
        if loss < best:
            best, kept = loss, Factors(state.a.clone(), state.core.clone(), state.b.clone(), state.mask.clone())
        record(best)
        if best < reference * (1 - _MIN_GAIN):
            reference, since = best, 0
        else:
            since += 1
        if since >= _PATIENCE:
            return _finish(kept), StopReason.TOLERANCE
    return _finish(kept), StopReason.ITERATIONS


def _start(problem: AdamProblem, factors: Factors) -> _State:
    a, core, b = factors.a.clone(), factors.core.clone(), factors.b.clone()
    t = right_multiply(core, b)
    error = problem.target - left_multiply(a, t)
    return _State(a, core, b, index_to_mask(factors.index), t, error, error * problem.weights)


def _finish(kept: Factors) -> Factors:
    """While iterating the mask itself stands in the place of its index, which is only needed once."""
    if kept.index.dtype == torch.bool:
        kept.index = mask_to_index(kept.index)
    return kept


def _loss(state: _State) -> float:
    value = stable_sum(state.error * state.weighted)
    if not value < float("inf"):
        raise NumericalError(f"the loss of the adam solver became {value}")
    return value


def _adam_step(problem: AdamProblem, state: _State, optimizer: torch.optim.Optimizer) -> Tensor:
    """One joint step on A, S∘M and B; returns the loss's gradient in S `(O, I)` before the step."""
    gradient = state.weighted.mul_(-2)
    size_o, size_i = state.a.shape[-1], state.b.shape[-1]
    rows = gradient.view(-1, size_o, gradient.shape[1])
    back = left_multiply(state.a.mT, gradient)
    in_core = right_multiply(back, state.b.mT)
    state.a.grad = torch.bmm(rows, state.t.view(rows.shape).mT)
    state.b.grad = torch.bmm(_column_blocks(state.core, size_i).mT, _column_blocks(back, size_i))
    state.core.grad = in_core * state.mask
    optimizer.step()
    state.core.mul_(state.mask)
    state.t = right_multiply(state.core, state.b)
    torch.sub(problem.target, left_multiply(state.a, state.t), out=state.error)
    torch.mul(state.error, problem.weights, out=state.weighted)
    return in_core


def _column_blocks(x: Tensor, size: int) -> Tensor:
    """View `(O, I)` as `(K, O, b_i)`."""
    return x.view(x.shape[0], -1, size).transpose(0, 1)


def _draw(problem: AdamProblem, state: _State, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """One (row, group) in every block, with probability ∝ the L1 norm of the group's gradient; each `(J, K)`."""
    blocks_o, size_o, blocks_i, size_i = state.grid(gradient).shape
    groups = size_i // GROUP
    norms = gradient.abs().view(blocks_o, size_o, blocks_i, groups, GROUP).sum(-1).transpose(1, 2)
    cumulative = norms.reshape(blocks_o, blocks_i, size_o * groups).cumsum(-1)
    uniform = torch.rand(blocks_o, blocks_i, 1, generator=problem.generator, device=gradient.device)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)[..., 0]
    drawn.clamp_(max=size_o * groups - 1)
    return drawn // groups, drawn % groups


def _solve_drawn_groups(problem: AdamProblem, state: _State, drawn: tuple[Tensor, Tensor]) -> None:
    """Solve the drawn group of every block exactly over its masks; keeps `t`, `error` and `weighted` current."""
    row, group = drawn
    device = row.device
    j = torch.arange(row.shape[0], device=device)[:, None]
    k = torch.arange(row.shape[1], device=device)[None, :]
    columns = group[..., None] * GROUP + torch.arange(GROUP, device=device)
    at = (j[..., None], row[..., None], k[..., None], columns)
    a_column = state.a[j, :, row]
    b_rows = state.b[k[..., None], columns]
    core, mask = state.grid(state.core), state.grid(state.mask)
    old = core[at]
    new, keep = _best_group(problem, state, a_column, b_rows, old, mask[at])
    core[at], mask[at] = new, keep
    change = ((new - old)[..., None] * b_rows).sum(-2)
    state.grid(state.t)[j, row, k] += change
    state.grid(state.error).addcmul_(a_column.transpose(1, 2)[..., None], change[:, None], value=-1)
    torch.mul(state.error, problem.weights, out=state.weighted)


def _best_group(
    problem: AdamProblem, state: _State, a_column: Tensor, b_rows: Tensor, old: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    """New values and masks `(J, K, 4)` of one group a block; the old ones where no mask lowers the loss."""
    pivot = a_column.square().sum(-1)[..., None]
    weights = problem.weights.view(1, state.b.shape[0], 1, -1)
    gram = torch.matmul(b_rows * weights, b_rows.mT)
    products = torch.bmm(a_column, state.weighted.view(len(a_column), a_column.shape[-1], -1))
    through_a = products.view(*a_column.shape[:2], *state.b.shape[:2]).diagonal(dim1=1, dim2=2).mT
    c = torch.matmul(b_rows, through_a[..., None])[..., 0] + pivot * (old[..., None] * gram).sum(-2)
    values, gain = _pair_solutions(c, gram)
    if problem.fixed_mask:
        gain = torch.where((pair_table(mask.device) == mask[..., None, :]).all(-1), gain, -torch.inf)
    best = gain.argmax(-1, keepdim=True)
    new = values.gather(-2, best[..., None].expand(*best.shape, GROUP))[..., 0, :] / pivot
    now = (old * (2 * c - pivot * (old[..., None] * gram).sum(-2))).sum(-1, keepdim=True)
    better = gain.gather(-1, best) > pivot * now
    better &= pivot > 0
    return torch.where(better, new, old), torch.where(better, pair_table(mask.device)[best[..., 0]], mask)


def _pair_solutions(c: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
    """For each of the six masks: `G_m⁻¹ c_m` spread over four entries `(..., 6, 4)` and the gain `c_mᵀ G_m⁻¹ c_m` `(..., 6)`."""
    first, second = [p[0] for p in PAIRS], [p[1] for p in PAIRS]
    aa, bb, ab = gram[..., first, first], gram[..., second, second], gram[..., first, second]
    determinant = aa * bb - ab * ab
    regular = determinant > 1e-6 * aa * bb
    scale = regular / torch.where(regular, determinant, torch.ones_like(determinant))
    ca, cb = c[..., first], c[..., second]
    va, vb = (bb * ca - ab * cb) * scale, (aa * cb - ab * ca) * scale
    values = torch.zeros(*c.shape[:-1], len(PAIRS), GROUP, dtype=c.dtype, device=c.device)
    lanes = torch.arange(len(PAIRS), device=c.device)
    values[..., lanes, first], values[..., lanes, second] = va, vb
    return values, va * ca + vb * cb
