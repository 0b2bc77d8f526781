"""Exact block coordinate descent with momentum for the `diagonal` objective (`solver: exact`, see `docs/solver.md`).

All functions work in scaled coordinates: target `W̄ √h` and B scaled likewise, so that the loss is `‖target − A·S·B‖²`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver.blockdiag import left_multiply, right_multiply, stable_sum
from armor_recipes.solver.patterns import GROUP
from armor_recipes.solver.result import Factors, StopReason
from armor_recipes.solver.sweep import SweepProblem, sweep

#: Ridge of the normal equations as a share of the mean diagonal. An increment with a ridge is a proximal step: it cannot
#: raise the loss, whatever the ridge.
_RIDGE = 1e-6
_JITTER_TRIES = 4
#: `tolerance` is compared with the relative gain over this many cycles: a rejected extrapolation gains nothing by itself.
_PATIENCE = 5
_BETA_SHRINK, _BETA_GROW, _BETA_STEP = 0.7, 1.05, 0.02


@dataclass(slots=True)
class ExactProblem:
    """The target `(O, I)` in scaled coordinates, and how it may be solved."""

    target: Tensor
    fixed_mask: bool = False
    native: bool | None = None
    counts: Counter[str] = field(default_factory=Counter)


def solve_exact(
    problem: ExactProblem,
    factors: Factors,
    *,
    iterations: int,
    tolerance: float,
    record: Callable[[float], None],
) -> tuple[Factors, StopReason]:
    """Run cycles sweep → A → B with momentum and restart; `record` gets the best squared error after each cycle.

    A cycle that starts from extrapolated factors and ends higher is thrown away and followed by a plain cycle; both count.
    Returns the best factors seen, which are never worse than those given.
    """
    last, now = factors, factors
    best = squared_error(problem, now)
    history = [best]
    beta = 0.0
    for _ in range(iterations):
        trial = cycle(problem, extrapolate(now, last, beta=beta) if beta > 0 else now.clone())
        loss = squared_error(problem, trial)
        if loss < best:
            last, now, best = now, trial, loss
            beta = _BETA_GROW * beta + _BETA_STEP if last is not factors else _BETA_STEP
        elif beta > 0:
            beta, last = _BETA_SHRINK * beta, now
            # The next cycle is plain: `last is now` leaves nothing to extrapolate.
        record(best)
        history.append(best)
        if converged(history, tolerance):
            return now, StopReason.TOLERANCE
    return now, StopReason.ITERATIONS


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
    same = (now.index == last.index).repeat_interleave(GROUP, dim=1)
    core = torch.where(same, torch.lerp(last.core, now.core, 1 + beta), now.core)
    return Factors(torch.lerp(last.a, now.a, 1 + beta), core, torch.lerp(last.b, now.b, 1 + beta), now.index.clone())


def residual(problem: ExactProblem, factors: Factors) -> Tensor:
    """`E = target − A · S · B`, `(O, I)`."""
    return problem.target - left_multiply(factors.a, right_multiply(factors.core, factors.b))


def squared_error(problem: ExactProblem, factors: Factors) -> float:
    """`‖E‖²`, squared in float32 and summed in float64. Raises NumericalError where it is not finite."""
    value = stable_sum(residual(problem, factors).square())
    if not value < float("inf"):
        raise NumericalError(
            f"the reconstruction loss became {value}: the weight or its statistics are out of float32's range"
        )
    return value


def update_core(problem: ExactProblem, factors: Factors) -> None:
    """One sweep over all groups of S (`armor_recipes.solver.sweep`)."""
    a, b = factors.a, factors.b
    correlation = right_multiply(left_multiply(a.mT, residual(problem, factors)), b.mT)
    shape = (a.shape[-1], b.shape[-1])
    work = SweepProblem(
        correlation=to_blocks(correlation, *shape),
        core=to_blocks(factors.core, *shape),
        index=to_blocks(factors.index, shape[0], shape[1] // GROUP),
        gram_a=torch.bmm(a.mT, a).contiguous(),
        gram_b=torch.bmm(b, b.mT).contiguous(),
        fixed_mask=problem.fixed_mask,
    )
    sweep(work, native=problem.native)
    factors.core, factors.index = from_blocks(work.core), from_blocks(work.index)


def update_a(problem: ExactProblem, factors: Factors) -> None:
    """`A_j += (E_j T_jᵀ)(T_j T_jᵀ + εI)⁻¹` with `T = S · B`."""
    size = factors.a.shape[-1]
    t = right_multiply(factors.core, factors.b)
    t_blocks = t.reshape(-1, size, t.shape[1])
    e_blocks = (problem.target - left_multiply(factors.a, t)).reshape(t_blocks.shape)
    step = solve_normal(torch.bmm(t_blocks, t_blocks.mT), torch.bmm(t_blocks, e_blocks.mT), problem.counts)
    factors.a = factors.a + step.mT


def update_b(problem: ExactProblem, factors: Factors) -> None:
    """`B_k += (Σ_j U_jkᵀ U_jk + εI)⁻¹ Σ_j U_jkᵀ E_jk` with `U = A · S`."""
    size = factors.b.shape[-1]
    u = left_multiply(factors.a, factors.core)
    e = problem.target - right_multiply(u, factors.b)
    u_blocks, e_blocks = (x.reshape(x.shape[0], -1, size).permute(1, 0, 2) for x in (u, e))
    factors.b = factors.b + solve_normal(
        torch.bmm(u_blocks.mT, u_blocks), torch.bmm(u_blocks.mT, e_blocks), problem.counts
    )


def solve_normal(gram: Tensor, rhs: Tensor, counts: Counter[str]) -> Tensor:
    """`(G + εI)⁻¹ R` for a batch of Gram matrices `(n, b, b)`, solved in float64; ε is 1e-6 of G's mean diagonal.

    Where the factorisation fails ε grows tenfold, at most four times, each time counted under `gram_jitter`; then
    NumericalError. A zero Gram matrix gives no change; so do its zero rows, because their right-hand side is zero.
    """
    gram, rhs64 = gram.double(), rhs.double()
    mean = gram.diagonal(dim1=1, dim2=2).mean(-1)
    ridge = torch.where(mean > 0, _RIDGE * mean, torch.ones_like(mean))
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    for _ in range(_JITTER_TRIES):
        factor, info = torch.linalg.cholesky_ex(gram + ridge[:, None, None] * eye)
        failed = info != 0
        count = int(failed.sum())
        if count == 0:
            return torch.cholesky_solve(rhs64, factor).to(rhs.dtype)
        counts["gram_jitter"] += count
        ridge = torch.where(failed, 10 * ridge, ridge)
    raise NumericalError(
        f"{count} Gram matrices of {gram.shape[0]} are not positive definite even with a ridge of 1e-3"
    )


def to_blocks(x: Tensor, rows: int, columns: int) -> Tensor:
    """`(J·rows, K·columns)` to contiguous `(J, K, rows, columns)`."""
    return x.reshape(x.shape[0] // rows, rows, x.shape[1] // columns, columns).transpose(1, 2).contiguous()


def from_blocks(x: Tensor) -> Tensor:
    """Inverse of `to_blocks`."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1).contiguous()
