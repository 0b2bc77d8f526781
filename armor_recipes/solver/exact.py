"""Exact block coordinate descent with momentum (`solver: exact`, see `docs/solver.md`), and the steps of `diagonal`.

The steps of `hessian` are in `hessian.py`; `solve_exact` runs either. The steps here work in scaled coordinates: target `W̄ √h`
and B scaled likewise, so that the loss is `‖target − A·S·B‖²`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver.blockdiag import left_multiply, right_multiply
from armor_recipes.solver.patterns import TWO_OF_FOUR, Pattern
from armor_recipes.solver.result import Factors, StopReason
from armor_recipes.solver.rows import stable_sum
from armor_recipes.solver.spd import NORMAL_EQUATIONS, cholesky
from armor_recipes.solver.sweep import SweepProblem, join_blocks, sweep

#: `tolerance` is compared with the relative gain over this many cycles; as many follow with little momentum, to settle.
_PATIENCE = 10
#: A cycle may end this much above the last one, relative, before it is thrown away: momentum crosses low ridges that way.
_SLACK = 1e-2
#: Momentum after a cycle that was thrown away, and its recovery with each that was kept.
_SHRINK, _GROW = 0.7, 1.05
_WARM_CYCLES, _WARM_FROM, _BASE = 8, 0.5, 0.9
#: Cycles until nothing damps the motion (or half of all cycles, if that is sooner), and the share after which it cools.
_FULL_AT, _COOL_AFTER = 30, 0.85


class Problem(Protocol):
    """What `solve_exact` needs to know of an objective that is quadratic in each of A, S and B alone."""

    target: Tensor

    def cycle(self, factors: Factors) -> Factors:
        """One pass over S, A and B; changes `factors` in place and returns them."""
        ...

    def squared_error(self, factors: Factors) -> float:
        """The loss. Raises NumericalError where it is not finite."""
        ...


@dataclass(slots=True)
class ExactProblem:
    """The `diagonal` objective: the target `(O, I)` in scaled coordinates, and how it may be solved."""

    target: Tensor
    fixed_mask: bool = False
    native: bool | None = None
    counts: Counter[str] = field(default_factory=Counter)
    pattern: Pattern = TWO_OF_FOUR

    def cycle(self, factors: Factors) -> Factors:
        """As the function `cycle`."""
        return cycle(self, factors)

    def squared_error(self, factors: Factors) -> float:
        """As the function `squared_error`."""
        return squared_error(self, factors)


def solve_exact(
    problem: Problem,
    factors: Factors,
    *,
    iterations: int,
    tolerance: float,
    record: Callable[[float], None],
) -> tuple[Factors, StopReason]:
    """Run cycles sweep → A → B with momentum; `record` gets the best squared error after each cycle.

    Every cycle starts from factors extrapolated by `momentum`. One that ends more than `_SLACK` above its predecessor is
    thrown away and followed by a plain cycle; both count. Returns the best factors seen, never worse than those given.
    """
    last = now = kept = factors
    best = current = problem.squared_error(now)
    history = [best]
    damping, end, settling = 1.0, iterations, False
    step = 0
    while step < end:
        beta = damping * (_BASE if settling else momentum(step, iterations))
        trial = problem.cycle(now.clone() if last is now else extrapolate(now, last, beta=beta))
        loss = problem.squared_error(trial)
        if loss < current * (1 + _SLACK):
            last, now, current = now, trial, loss
            damping = min(1.0, _GROW * damping)
        else:
            last, damping = now, _SHRINK * damping
        if current < best:
            best, kept = current, now
        record(best)
        history.append(best)
        step += 1
        if not settling and converged(history, tolerance):
            settling, end = True, min(end, step + _PATIENCE)
    return kept, StopReason.TOLERANCE if step < iterations else StopReason.ITERATIONS


def momentum(step: int, total: int) -> float:
    """β of cycle `step` of `total`: from 0.5 to 0.9 in 8 cycles, on to 1 within 30 or half of all, 0.9 for the last 15 %.

    At β = 1 nothing damps the motion, and masks go on changing: that, not speed, is what a lower end comes from
    (`docs/solver.md` has the measurements). Above 1 masks freeze early; the last cycles settle what still swings.
    """
    progress = step / total
    if progress >= _COOL_AFTER:
        return _BASE
    if step < _WARM_CYCLES:
        return _WARM_FROM + (_BASE - _WARM_FROM) * step / _WARM_CYCLES
    return _BASE + (1 - _BASE) * min(1.0, max(2 * progress, step / _FULL_AT))


def converged(history: list[float], tolerance: float) -> bool:
    """Whether the last `_PATIENCE` cycles together gained less than `tolerance`, relative; never with tolerance 0."""
    return tolerance > 0 and len(history) > _PATIENCE and history[-1] >= history[-1 - _PATIENCE] * (1 - tolerance)


def cycle(problem: ExactProblem, factors: Factors) -> Factors:
    """One pass over S (all groups, masks included), A and B, each step exact given the others; changes `factors` in place."""
    update_core(problem, factors)
    update_a(problem, factors)
    update_b(problem, factors)
    return factors


def extrapolate(now: Factors, last: Factors, *, beta: float) -> Factors:
    """`now + β (now − last)` in A, B and those groups of S whose mask did not change."""
    group = now.core.shape[1] // now.index.shape[1]
    same = (now.index == last.index).repeat_interleave(group, dim=1)
    core = torch.where(same, torch.lerp(last.core, now.core, 1 + beta), now.core)
    return Factors(torch.lerp(last.a, now.a, 1 + beta), core, torch.lerp(last.b, now.b, 1 + beta), now.index.clone())


def residual(problem: Problem, factors: Factors) -> Tensor:
    """`E = target − A · S · B`, `(O, I)`."""
    return _less(problem.target, left_multiply(factors.a, right_multiply(factors.core, factors.b)))


def _less(target: Tensor, product: Tensor) -> Tensor:
    """`target − product`, in the memory of the product."""
    return torch.sub(target, product, out=product)


def squared_error(problem: ExactProblem, factors: Factors) -> float:
    """`‖E‖²`, squared in float32 and summed in float64. Raises NumericalError where it is not finite."""
    error = residual(problem, factors)
    return finite_loss(stable_sum(error, lambda part: error[part].square()))


def finite_loss(value: float) -> float:
    """The value itself. Raises NumericalError where it is not finite."""
    if not value < float("inf"):
        raise NumericalError(
            f"the reconstruction loss became {value}: the weight or its statistics are out of float32's range"
        )
    return value


def update_core(problem: ExactProblem, factors: Factors) -> None:
    """One sweep over all groups of S (`armor_recipes.solver.sweep`), in blocks wide enough that no group straddles two."""
    a, b = factors.a, factors.b
    correlation = right_multiply(left_multiply(a.mT, residual(problem, factors)), b.mT)
    group = problem.pattern.group
    shape = (a.shape[-1], math.lcm(b.shape[-1], group))
    work = SweepProblem(
        correlation=to_blocks(correlation, *shape),
        core=to_blocks(factors.core, *shape),
        index=to_blocks(factors.index, shape[0], shape[1] // group),
        gram_a=torch.bmm(a.mT, a).contiguous(),
        gram_b=join_blocks(torch.bmm(b, b.mT), shape[1]),
        fixed_mask=problem.fixed_mask,
        pattern=problem.pattern,
    )
    sweep(work, native=problem.native)
    factors.core, factors.index = from_blocks(work.core), from_blocks(work.index)


def update_a(problem: ExactProblem, factors: Factors) -> None:
    """`A_j += (E_j T_jᵀ)(T_j T_jᵀ + εI)⁻¹` with `T = S · B`."""
    size = factors.a.shape[-1]
    t = right_multiply(factors.core, factors.b)
    t_blocks = t.reshape(-1, size, t.shape[1])
    e_blocks = _less(problem.target, left_multiply(factors.a, t)).reshape(t_blocks.shape)
    step = solve_normal(torch.bmm(t_blocks, t_blocks.mT), torch.bmm(t_blocks, e_blocks.mT), problem.counts)
    factors.a = factors.a + step.mT


def update_b(problem: ExactProblem, factors: Factors) -> None:
    """`B_k += (Σ_j U_jkᵀ U_jk + εI)⁻¹ Σ_j U_jkᵀ E_jk` with `U = A · S`."""
    size = factors.b.shape[-1]
    u = left_multiply(factors.a, factors.core)
    e = _less(problem.target, right_multiply(u, factors.b))
    u_blocks, e_blocks = (x.reshape(x.shape[0], -1, size).permute(1, 0, 2) for x in (u, e))
    factors.b = factors.b + solve_normal(
        torch.bmm(u_blocks.mT, u_blocks), torch.bmm(u_blocks.mT, e_blocks), problem.counts
    )


def solve_normal(gram: Tensor, rhs: Tensor, counts: Counter[str]) -> Tensor:
    """`(G + εI)⁻¹ R` for a batch of Gram matrices `(n, b, b)`, solved in float64; ε is 1e-6 of G's mean diagonal.

    Where the factorisation fails ε grows tenfold, up to 1e-3, each failure counted under `gram_jitter`; then
    NumericalError. A zero Gram matrix gives no change; so do its zero rows, because their right-hand side is zero.
    """
    return torch.cholesky_solve(rhs.double(), factor_normal(gram, counts)).to(rhs.dtype)


def factor_normal(gram: Tensor, counts: Counter[str]) -> Tensor:
    """The lower Cholesky factors of `G + εI` in float64, with ε as `solve_normal` says; of G the lower triangle is read."""
    factor, retries = cholesky(
        gram,
        ridges=NORMAL_EQUATIONS,
        what="normal equations of A or B",
        advice="check the weight and its statistics, or raise `damping`",
    )
    if retries:
        counts["gram_jitter"] += retries
    return factor


def to_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """`(J·rows, K·columns)` to contiguous `(J, K, rows, columns)`."""
    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns).transpose(1, 2).contiguous()


def from_blocks(x: Tensor) -> Tensor:
    """Inverse of `to_blocks`."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1).contiguous()
