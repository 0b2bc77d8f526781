"""`solver: adam`: our implementation of the paper's method (ARMOR, §3; `docs/solver.md`).

Each iteration takes one joint Adam step on (A, B, S∘M), then draws one group in every block with probability proportional
to the L1 norm of its gradient, and solves it exactly over the masks of the pattern. The best state is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver.blockdiag import left_multiply, right_multiply
from armor_recipes.solver.groups import solve_group
from armor_recipes.solver.patterns import TWO_OF_FOUR, Pattern, index_to_mask
from armor_recipes.solver.result import Factors, StopReason
from armor_recipes.solver.rows import stable_sum

#: The paper's settings.
LEARNING_RATE = 1e-4
_PATIENCE, _MIN_GAIN = 100, 1e-6
#: What chooses a group in every block: from the gradients `(J, K, b_o, G, M)` of G groups a row to numbers `(J, K)` below b_o·G.
Selection = Callable[[Tensor, torch.Generator], Tensor]


def draw(weights: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers `(J, K)`, drawn with probability ∝ weights `(J, K, b_o, G)` that are not negative."""
    cumulative = weights.flatten(2).cumsum(-1)
    uniform = torch.rand(*weights.shape[:2], 1, generator=generator, device=weights.device)
    drawn = torch.searchsorted(cumulative, uniform * cumulative[..., -1:], right=True)[..., 0]
    return drawn.clamp_(max=cumulative.shape[-1] - 1)


def draw_by_l1_norm(gradient: Tensor, generator: torch.Generator) -> Tensor:
    """The `Selection` of the paper's results: drawn with probability ∝ the L1 norm of the group's gradient."""
    return draw(gradient.abs().sum(-1), generator)


@dataclass(slots=True)
class AdamProblem:
    """Target W̄ `(O, I)`, column weights h `(I,)`, whether masks stay fixed, the generator that draws groups, and how.

    B's blocks are a multiple of M wide, so that each group lies in one block.
    """

    target: Tensor
    weights: Tensor
    generator: torch.Generator
    fixed_mask: bool = False
    pattern: Pattern = TWO_OF_FOUR
    select: Selection = draw_by_l1_norm


@dataclass(slots=True)
class _State:
    """The iterate, with `t = S·B`, `error = W̄ − A·S·B` and `weighted = error·h` kept current, all `(O, I)` row-major.

    `mask` `(O, I)` and `index` `(O, I/M)` say the same.
    """

    a: Tensor
    core: Tensor
    b: Tensor
    index: Tensor
    mask: Tensor
    t: Tensor
    error: Tensor
    weighted: Tensor

    def grid(self, x: Tensor) -> Tensor:
        """View `(O, I)` as `(J, b_o, K, b_i)`, and `(O, I/M)` alike."""
        return x.view(self.a.shape[0], self.a.shape[1], self.b.shape[0], -1)

    def factors(self) -> Factors:
        """A copy of the iterate."""
        return Factors(self.a, self.core, self.b, self.index).clone()


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
            best, kept = loss, state.factors()
        record(best)
        if best < reference * (1 - _MIN_GAIN):
            reference, since = best, 0
        else:
            since += 1
        if since >= _PATIENCE:
            return kept, StopReason.TOLERANCE
    return kept, StopReason.ITERATIONS


def _start(problem: AdamProblem, factors: Factors) -> _State:
    own = factors.clone()
    t = right_multiply(own.core, own.b)
    error = problem.target - left_multiply(own.a, t)
    mask = index_to_mask(own.index, problem.pattern)
    return _State(own.a, own.core, own.b, own.index, mask, t, error, error * problem.weights)


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
    """One (row, group) in every block, as the problem selects it; each `(J, K)`."""
    blocks_o, size_o, blocks_i, size_i = state.grid(gradient).shape
    groups = size_i // problem.pattern.group
    number = problem.select(gradient.view(blocks_o, size_o, blocks_i, groups, -1).transpose(1, 2), problem.generator)
    return number // groups, number % groups


def _solve_drawn_groups(problem: AdamProblem, state: _State, drawn: tuple[Tensor, Tensor]) -> None:
    """Solve the drawn group of every block exactly over its masks; keeps `mask`, `t`, `error` and `weighted` current."""
    (row, group), size = drawn, problem.pattern.group
    j = torch.arange(row.shape[0], device=row.device)[:, None]
    k = torch.arange(row.shape[1], device=row.device)[None, :]
    columns = group[..., None] * size + torch.arange(size, device=row.device)
    at = (j[..., None], row[..., None], k[..., None], columns)
    a_column = state.a[j, :, row]
    b_rows = state.b[k[..., None], columns]
    core, index = state.grid(state.core), state.grid(state.index)
    old = core[at]
    new, number = solve_group(
        _correlation(state, a_column, b_rows),
        torch.matmul(b_rows * problem.weights.view(1, state.b.shape[0], 1, -1), b_rows.mT),
        old,
        index[j, row, k, group],
        a_column.square().sum(-1)[..., None],
        pattern=problem.pattern,
        fixed_mask=problem.fixed_mask,
    )
    core[at], index[j, row, k, group] = new, number
    state.grid(state.mask)[at] = index_to_mask(number.flatten()[:, None], problem.pattern).view(new.shape)
    change = ((new - old)[..., None] * b_rows).sum(-2)
    state.grid(state.t)[j, row, k] += change
    state.grid(state.error).addcmul_(a_column.transpose(1, 2)[..., None], change[:, None], value=-1)
    torch.mul(state.error, problem.weights, out=state.weighted)


def _correlation(state: _State, a_column: Tensor, b_rows: Tensor) -> Tensor:
    """Of the weighted error with the entries of one group a block, `(J, K, M)`."""
    products = torch.bmm(a_column, state.weighted.view(len(a_column), a_column.shape[-1], -1))
    through_a = products.view(*a_column.shape[:2], *state.b.shape[:2]).diagonal(dim1=1, dim2=2).mT
    return torch.matmul(b_rows, through_a[..., None])[..., 0]
