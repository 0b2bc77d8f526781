"""The one door of the solver: a weight and its input statistics in, `A · S · B` out."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from armor_recipes.compute import plain_torch
from armor_recipes.errors import NumericalError
from armor_recipes.solver.adam import AdamProblem, solve_adam
from armor_recipes.solver.blockdiag import left_multiply, right_multiply
from armor_recipes.solver.exact import ExactProblem, Problem, solve_exact
from armor_recipes.solver.hessian import HessianProblem, quadratic_form
from armor_recipes.solver.normalize import Normalized, fill_dead_channels, normalized
from armor_recipes.solver.patterns import (
    TWO_OF_FOUR,
    Pattern,
    index_to_mask,
    magnitude_mask,
    mask_to_index,
    parse_pattern,
)
from armor_recipes.solver.result import Factorization, Factors, StopReason
from armor_recipes.solver.rows import parts, stable_sum

SOLVERS = ("exact", "adam")
#: Slack of the invariant loss_t ≤ loss_0: the last loss is computed afresh from the returned float32 factors.
_ROUNDING = 1e-5
#: What `on_progress` is called with after every iteration: iterations done, iterations at most, best relative loss.
Progress = Callable[[int, int, float], None]


@plain_torch()
@torch.no_grad()
def factorize(
    weight: Tensor,
    second_moment: Tensor,
    *,
    block_size: int | tuple[int, int],
    pattern: str = "2:4",
    gram: Tensor | None = None,
    normalize: bool = True,
    row_weights: Tensor | None = None,
    solver: str = "exact",
    iterations: int,
    tolerance: float = 0.0,
    mask: Tensor | None = None,
    seed: int,
    on_progress: Progress | None = None,
    native: bool | None = None,
) -> Factorization:
    """Factorise `W ≈ A · S · B` with S in an N:M pattern and A, B block-diagonal (ARMOR, arXiv 2510.05528).

    Minimises `Σ_ij (W̄ − Ŵ)²_ij h_j` on the NoWag-normalised W̄ (paper, Eq. 2), or with `gram` G the `hessian` objective
    `tr((W̄ − Ŵ) G (W̄ − Ŵ)ᵀ)`; both start from NoWag-P.

    Args:
        weight: W `(O, I)`, any float dtype; solved in float32 on its device.
        second_moment: h `(I,)`, mean of x² over the calibration tokens.
        block_size: b for both factors, or `(b_o, b_i)`; must divide `(O, I)`. For `adam` b_i is a multiple of M.
        pattern: `"N:M"`, 1 <= N < M <= 32, M a divisor of I: N kept values in every M consecutive ones of a row.
            For M <= 8 each group is solved over all its masks, for larger ones over two (`groups.eliminate`).
        gram: G `(I, I)`, what `regularize` makes of the inputs' Gram matrix; None for the paper's objective. `exact` only.
        normalize: False leaves W as it is, so that the `hessian` loss is the error of the module's output itself.
        row_weights: ω `(O,)`, above 0: how many times the squared error of each row of W̄ counts (`gradient_row_weights`).
        solver: `"exact"` (block coordinate descent with momentum) or `"adam"` (our implementation of the paper's method).
        iterations: cycles of `exact`, Adam steps of `adam`; 0 gives NoWag-P.
        tolerance: `exact` ends when ten cycles together gain less than this, relative; 0 never stops it early.
            `adam` keeps the paper's rule.
        mask: bool `(O, I)` in the pattern; given, it stays fixed.
        seed: seeds the groups that `adam` draws; `exact` draws nothing.
        on_progress: called after each iteration with (done, at most, best relative loss).
        native: None takes the fastest form of the sweep there is (`sweep.sweep_form`); False the torch reference.

    Raises:
        ValueError: shapes, sizes or names that do not fit.
        NumericalError: values that are not finite, or a loss above NoWag-P's.
    """
    sizes = check_arguments(weight, second_moment, block_size, pattern=pattern, gram=gram, solver=solver)
    _check_row_weights(weight, row_weights)
    form = parse_pattern(pattern)
    normal, h, dead = _prepare(weight, second_moment, normalize=normalize, row_weights=row_weights)
    scores = normal.weight.square() * h
    start = nowag_start(normal.weight, magnitude_mask(scores, form) if mask is None else mask, sizes, form)
    counts = Counter(_dead_count(dead))
    run = _Run(normal.weight, h, gram, form, mask is not None, iterations, tolerance, counts)
    clock = _Clock(total=run.total(), iterations=iterations, on_progress=on_progress)
    clock.enter(run.error(start))
    masks = start.index.clone()
    factors, reason = run.exact(start, clock, native) if solver == "exact" else run.adam(start, clock, seed)
    clock.check(run.error(factors))
    changed = float((factors.index != masks).double().mean())
    return replace(_result(normal, factors, form, clock, reason, counts), masks_changed=changed)


def check_arguments(
    weight: Tensor,
    second_moment: Tensor,
    block_size: int | tuple[int, int],
    *,
    pattern: str = "2:4",
    gram: Tensor | None = None,
    solver: str = "exact",
) -> tuple[int, int]:
    """Validate what `factorize` is given; returns `(b_o, b_i)`. Raises ValueError with the value that does not fit."""
    if solver not in SOLVERS:
        raise ValueError(f"solver={solver!r} is not one of {', '.join(SOLVERS)}")
    if gram is not None and (solver == "adam" or gram.shape != (weight.shape[1], weight.shape[1])):
        raise ValueError(f"gram must be (I, I) and goes with solver='exact'; got {tuple(gram.shape)} and {solver=}")
    if weight.ndim != 2 or second_moment.shape != weight.shape[1:]:
        raise ValueError(
            f"weight must be (O, I) and second_moment (I,), got {tuple(weight.shape)} and {tuple(second_moment.shape)}"
        )
    b_o, b_i = (block_size, block_size) if isinstance(block_size, int) else block_size
    d_out, d_in = weight.shape
    if b_o < 1 or d_out % b_o:
        raise ValueError(f"block_size {b_o=} does not divide {d_out=}")
    if b_i < 1 or d_in % b_i:
        raise ValueError(f"block_size {b_i=} does not divide {d_in=}")
    group = parse_pattern(pattern).group
    if d_in % group:
        raise ValueError(f"pattern {pattern} needs a multiple of {group} columns, and {d_in=}")
    if solver == "adam" and b_i % group:
        raise ValueError(f"solver='adam' needs block_size {b_i=} to be a multiple of {group} with pattern {pattern}")
    return b_o, b_i


def _check_row_weights(weight: Tensor, row_weights: Tensor | None) -> None:
    if row_weights is None:
        return
    if row_weights.shape != weight.shape[:1]:
        raise ValueError(f"row_weights must be ({weight.shape[0]},), got {tuple(row_weights.shape)}")
    if not bool(((row_weights > 0) & row_weights.isfinite()).all()):
        raise ValueError("row_weights must be finite and above 0")


@plain_torch()
@torch.no_grad()
def nowag_mask(weight: Tensor, second_moment: Tensor, *, pattern: str = "2:4") -> tuple[Tensor, dict[str, int]]:
    """NoWag-P's N:M mask, bool `(O, I)`: the top N of each group by W̄²_ij · h_j, ties to the lower index; and counts.

    Raises ValueError for a pattern that is none, NumericalError for values that are not finite.
    """
    normal, h, dead = _prepare(weight, second_moment)
    return magnitude_mask(normal.weight.square() * h, parse_pattern(pattern)), _dead_count(dead)


def _prepare(
    weight: Tensor, second_moment: Tensor, *, normalize: bool = True, row_weights: Tensor | None = None
) -> tuple[Normalized, Tensor, int]:
    """W̄ with its norms (W and ones without normalisation), h scaled to mean 1, and how many dead channels were filled."""
    h, dead = fill_dead_channels(second_moment.float())
    raw = checked_finite(weight.float())
    normal = normalized(raw, normalize=normalize, row_weights=row_weights)
    return normal, h / h.mean(), dead


def _dead_count(dead: int) -> dict[str, int]:
    return {"dead_channels": dead} if dead else {}


def checked_finite(weight: Tensor) -> Tensor:
    """The weight itself. Raises NumericalError where a value is not finite."""
    bad = sum(int((~torch.isfinite(weight[part])).sum()) for part in parts(weight))
    if bad:
        raise NumericalError(f"{bad} of {weight.numel()} weights are not finite")
    return weight


def nowag_start(target: Tensor, mask: Tensor, sizes: tuple[int, int], pattern: Pattern = TWO_OF_FOUR) -> Factors:
    """NoWag-P as factors: A = I, B = I, S = W̄ on the mask."""
    (d_out, d_in), (b_o, b_i) = target.shape, sizes
    eye_o, eye_i = (torch.eye(size, dtype=target.dtype, device=target.device) for size in sizes)
    return Factors(
        a=eye_o.repeat(d_out // b_o, 1, 1),
        core=target * mask,
        b=eye_i.repeat(d_in // b_i, 1, 1),
        index=mask_to_index(mask, pattern),
    )


@dataclass(slots=True)
class _Run:
    """One solve on W̄ `(O, I)` with weights h `(I,)` or Gram matrix `(I, I)`; factors go in and come out unscaled."""

    target: Tensor
    h: Tensor
    gram: Tensor | None
    pattern: Pattern
    fixed: bool
    iterations: int
    tolerance: float
    counts: Counter[str]

    def total(self) -> float:
        """The loss of Ŵ = 0."""
        if self.gram is not None:
            return quadratic_form(self.target, self.gram)
        return stable_sum(self.target, lambda part: self.target[part].square() * self.h)

    def error(self, factors: Factors) -> float:
        """The loss of the factors."""
        error = self.target - left_multiply(factors.a, right_multiply(factors.core, factors.b))
        if self.gram is not None:
            return quadratic_form(error, self.gram)
        return stable_sum(error, lambda part: error[part].double().square() * self.h)

    def exact(self, start: Factors, clock: _Clock, native: bool | None) -> tuple[Factors, StopReason]:
        if self.gram is not None:
            return self._solved(self._hessian_problem(self.gram, native), start, clock)
        root = self.h.sqrt().view(start.b.shape[0], 1, -1)
        problem = ExactProblem(
            self.target * self.h.sqrt(),
            fixed_mask=self.fixed,
            native=native,
            counts=self.counts,
            pattern=self.pattern,
        )
        scaled = Factors(start.a, start.core, start.b * root, start.index)
        found, reason = self._solved(problem, scaled, clock)
        return Factors(found.a, found.core, found.b / root, found.index), reason

    def _hessian_problem(self, gram: Tensor, native: bool | None) -> HessianProblem:
        return HessianProblem(
            self.target, gram, fixed_mask=self.fixed, native=native, counts=self.counts, pattern=self.pattern
        )

    def _solved(self, problem: Problem, start: Factors, clock: _Clock) -> tuple[Factors, StopReason]:
        return solve_exact(problem, start, iterations=self.iterations, tolerance=self.tolerance, record=clock.enter)

    def adam(self, start: Factors, clock: _Clock, seed: int) -> tuple[Factors, StopReason]:
        generator = torch.Generator(device=self.target.device).manual_seed(seed)
        problem = AdamProblem(self.target, self.h, generator, fixed_mask=self.fixed, pattern=self.pattern)
        return solve_adam(problem, start, iterations=self.iterations, record=clock.enter)


class _Clock:
    """Keeps the trace of best relative losses and their times, and checks the invariant at the end."""

    def __init__(self, *, total: float, iterations: int, on_progress: Progress | None) -> None:
        self.total = total
        self.iterations = iterations
        self.on_progress = on_progress
        self.started = time.perf_counter()
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def enter(self, squared_error: float) -> None:
        """Record the best loss after one more iteration."""
        self.losses.append(squared_error / self.total if self.total > 0 else 0.0)
        self.seconds.append(time.perf_counter() - self.started)
        if self.on_progress is not None and len(self.losses) > 1:
            self.on_progress(len(self.losses) - 1, self.iterations, self.losses[-1])

    def check(self, squared_error: float) -> None:
        """Raise NumericalError if the final factors are worse than NoWag-P (the paper's Theorem 3.1 says they cannot be)."""
        final = squared_error / self.total if self.total > 0 else 0.0
        if not final <= self.losses[0] * (1 + _ROUNDING) + _ROUNDING**2:
            raise NumericalError(f"the solver ended at relative loss {final:.6g}, above its start {self.losses[0]:.6g}")


def _result(
    normal: Normalized, factors: Factors, pattern: Pattern, clock: _Clock, reason: StopReason, counts: Counter[str]
) -> Factorization:
    """Fold the norms into A's rows and B's columns."""
    a = factors.a * normal.rows.view(*factors.a.shape[:2], 1)
    b = factors.b * normal.columns.view(factors.b.shape[0], 1, -1)
    return Factorization(
        a=a.contiguous(),
        core=factors.core,
        mask=index_to_mask(factors.index, pattern),
        b=b.contiguous(),
        losses=tuple(clock.losses),
        seconds=tuple(clock.seconds),
        stop_reason=reason,
        counts=dict(counts),
    )
