"""A core with integers for its kept values, and A, B and the integers themselves solved again (see `docs/solver.md`).

Everything is measured against the product `Ŵ = A · S · B` that the factors give before: with `diagonal` by
`Σ_ij (Ŵ − Ŵ')²_ij h_j`, with `hessian` by `tr((Ŵ − Ŵ') G (Ŵ − Ŵ')ᵀ)`, both on the weight as it is and relative to Ŵ' = 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver import exact, hessian
from armor_recipes.solver.blockdiag import left_multiply, right_multiply
from armor_recipes.solver.exact import ExactProblem
from armor_recipes.solver.gauge import apply_gauge, choose_gauge
from armor_recipes.solver.hessian import HessianProblem
from armor_recipes.solver.normalize import fill_dead_channels
from armor_recipes.solver.result import Factors, QuantizedValues, SparseFactors
from armor_recipes.solver.rounding import LARGEST_FLOAT8, Grid, nearest_number, update_rounded
from armor_recipes.solver.rows import stable_sum
from armor_recipes.solver.spd import cholesky

LEVELS = {8: (-127, 127), 4: (-8, 7)}
"""Smallest and largest integer by number of bits."""
Numbers = Literal["int", "fp8"]
#: The largest float8_e4m3fn.
Rounding = Literal["descent", "nearest", "gptq"]
#: Called after a cycle with (done, at most, best relative loss).
Progress = Callable[[int, int, float], None]
#: Scales that are tried, as shares of the one that reaches the largest value: smaller ones clip it and round the rest finer.
_RATIOS = tuple(1 - 0.05 * step for step in range(11))
#: The same where gauges are compared, of which there are many.
_FEW_RATIOS = (1.0, 0.8)
#: Bytes of the float64 Hessians that `gptq` works on at once.
_GPTQ_BYTES = 1 << 28
#: Another cycle follows only where the last one gained more than this, relative.
_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Requantized:
    """Factors with a quantised core.

    Attributes:
        factors: `quantized` is set, `core` is what its integers stand for; A and B in the dtype of those given.
        losses: relative, first with the given A and B, then after each cycle that was kept.
        stop_reason: `iterations`, `tolerance`, or `rounding` where A and B, rounded to their dtype, were no better than those
            given, which then stay.
        counts: `dead_channels` and `gram_jitter`, as elsewhere.
    """

    factors: SparseFactors
    losses: tuple[float, ...]
    stop_reason: str
    counts: Mapping[str, int]


def requantize(
    factors: SparseFactors,
    second_moment: Tensor,
    *,
    gram: Tensor | None = None,
    num_bits: int,
    group_size: int | None = None,
    rounding: Rounding = "nearest",
    iterations: int,
    resolve: bool = True,
    gauge: bool = True,
    numbers: Numbers = "int",
    activations: str | None = None,
    on_progress: Progress | None = None,
) -> Requantized:
    """Quantise the kept values of S, symmetrically, then re-solve A and B, S fixed, so that the product stays what it was.

    Args:
        factors: A `(J, b_o, b_o)`, S `(O, I)` with its 2:4 mask, B `(K, b_i, b_i)`, in the dtype in which they are stored.
        second_moment: h `(I,)`, mean of x² over the calibration tokens.
        gram: G `(I, I)` as `hessian.regularize` makes it, for the `hessian` loss; None for `diagonal`.
        num_bits: 8 or 4.
        group_size: kept values of a row that have one scale; None for a scale a row. Must divide I/2.
        rounding: `nearest`; or `gptq` (arXiv 2210.17323) on the kept values alone, which needs `gram`; or `descent`: nearest, and
            in each cycle every value again, as good as its grid allows given all others, A and B (`armor_recipes.solver.rounding`).
        iterations: cycles at most; 0 leaves what rounding gave.
        resolve: solve A and B in each cycle; without it they stay as they are, but for the gauge.
        gauge: choose a scale between B and S first (`armor_recipes.solver.gauge`).
        numbers: `int`, or `fp8` for float8_e4m3fn, with 8 bits and a scale a row, by `nearest` or `descent`.
        activations: `int8` or `fp8`, what Bx is rounded to as the layer runs: kept with the values, and `int8` counts in the gauge.
        on_progress: called after each cycle with (done, at most, best relative loss).

    Raises:
        ValueError: numbers or shapes that do not fit.
        NumericalError: values that are not finite.
    """
    _check(factors, second_moment, gram, num_bits, group_size, rounding)
    if numbers == "fp8" and ((num_bits, group_size) != (8, None) or rounding == "gptq"):
        raise ValueError(f"fp8 has 8 bits, a scale a row and no gptq, got {num_bits=}, {group_size=}, {rounding=}")
    h, dead = fill_dead_channels(second_moment.float())
    target = factors.dense()
    rounded = partial(
        round_to_nearest, num_bits=num_bits, group_size=group_size, dtype=factors.a.dtype, numbers=numbers
    )
    if gauge:
        roughly = partial(rounded, ratios=_FEW_RATIOS)
        factors = _gauged(factors, input_squares(factors.b, h, gram), roughly, activations)
    values, weights = kept(factors.core, factors.mask), kept_weights(factors, h, gram)
    found = replace(rounded(values, weights), activations=activations)
    if rounding == "gptq" and gram is not None:
        found = gptq(values, factors.mask, input_gram(factors.b, gram), found)
    start = replace(factors, core=spread(found.dequantize(), factors.mask), quantized=found)
    counts = Counter({"dead_channels": dead} if dead else {})
    grid = grid_of(found, factors.mask) if rounding == "descent" else None
    if grid is None and not resolve:
        iterations = 0
    return _Resolve.of(target, h, gram, factors.b.shape[0], counts, grid, resolve).run(start, iterations, on_progress)


def round_to_nearest(
    values: Tensor,
    weights: Tensor,
    *,
    num_bits: int,
    group_size: int | None = None,
    dtype: torch.dtype,
    numbers: Numbers = "int",
    ratios: Sequence[float] = _RATIOS,
) -> QuantizedValues:
    """The nearest integers (or float8_e4m3fn), with the scale of each group that leaves the least error.

    That is `Σ weight · (value − integer · scale)²`. Scales are sought among a few shares of the one that reaches the group's
    largest value, each rounded to `dtype` first, so that integers fit the scale that is stored. A group of zeros has scale 1.

    Args:
        values: `(O, N)` float32.
        weights: `(O, N)`, not negative.
        num_bits: 8 or 4.
        group_size: a divisor of N, or None for whole rows.
        dtype: of the scales.
        numbers: `int`, or `fp8` for float8_e4m3fn in the place of 8-bit integers.
        ratios: the shares that are tried.
    """
    float8 = numbers == "fp8"
    low, high = (-LARGEST_FLOAT8, LARGEST_FLOAT8) if float8 else LEVELS[num_bits]
    v, w = (x.unflatten(1, (-1, group_size or x.shape[1])) for x in (values, weights))
    largest = v.abs().amax(-1, keepdim=True)
    best, scale = torch.full_like(largest, torch.inf), torch.ones_like(largest)
    for ratio in ratios:
        trial = torch.where(largest > 0, _storable(largest * (ratio / high), dtype), scale)
        error = (w * (v - trial * nearest_number(v / trial, low, high, float8=float8)).square()).sum(-1, keepdim=True)
        better = error < best
        best, scale = torch.where(better, error, best), torch.where(better, trial, scale)
    stored = torch.float8_e4m3fn if float8 else torch.int8
    integers = nearest_number(v / scale, low, high, float8=float8).to(stored).flatten(1)
    return QuantizedValues(integers, scale.squeeze(-1).to(dtype), num_bits)


def gptq(values: Tensor, mask: Tensor, gram: Tensor, start: QuantizedValues) -> QuantizedValues:
    """Integers for the scales of `start` by GPTQ (arXiv 2210.17323) on the kept values alone, so that masks stay.

    Kept values are rounded from left to right, and the error of each moves those to its right: with the row's own Hessian
    H_r (rows and columns of `gram` that it keeps) and `H_r⁻¹ = UᵀU`, U upper triangular, `v[j:] −= (v_j − q_j) / U_jj · U[j, j:]`.
    A row for which `start` has the smaller error keeps it. All in float64.

    Args:
        values: `(O, N)`, what is rounded.
        mask: bool `(O, I)`, N kept entries in each row.
        gram: positive definite `(I, I)`, the Gram matrix of what S multiplies, `B G Bᵀ`.
        start: what `round_to_nearest` gave.

    Raises:
        NumericalError: where a row's Hessian is not positive definite.
    """
    rows, count = values.shape
    columns = mask.nonzero()[:, 1].view(rows, count)
    at_once = max(1, _GPTQ_BYTES // (8 * count * count))
    parts = zip(
        *(x.split(at_once) for x in (values.double(), columns, start.integers, start.scale.double())), strict=True
    )
    integers = [_gptq_rows(v, gram.double(), index, q, s, LEVELS[start.num_bits]) for v, index, q, s in parts]
    return replace(start, integers=torch.cat(integers))


def grid_of(found: QuantizedValues, mask: Tensor) -> Grid:
    """The grid on which the kept values of a core `(O, I)` lie."""
    scale = spread(_scales(found), mask)
    if found.integers.dtype == torch.float8_e4m3fn:
        return Grid(scale, -LARGEST_FLOAT8, LARGEST_FLOAT8, float8=True)
    return Grid(scale, *LEVELS[found.num_bits])


def kept(core: Tensor, mask: Tensor) -> Tensor:
    """The kept entries of S `(O, I)` row by row, float32 `(O, I/2)`."""
    return core.float()[mask].view(core.shape[0], -1)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Undo `kept`: S `(O, I)` with zeros where nothing is kept."""
    return values.new_zeros(mask.shape).masked_scatter_(mask, values)


def kept_weights(factors: SparseFactors, h: Tensor, gram: Tensor | None = None) -> Tensor:
    """What an error of each kept value weighs in its row, `(O, I/2)`: the mean square of its entry of Bx."""
    return kept(input_squares(factors.b, h, gram).expand(factors.mask.shape), factors.mask)


def input_squares(b: Tensor, h: Tensor, gram: Tensor | None = None) -> Tensor:
    """The mean square of each entry of Bx, float32 `(I,)`.

    With h `(I,)` alone as if the inputs were uncorrelated, with G `(I, I)` the diagonal of `B G Bᵀ`.
    """
    b = b.float()
    if gram is None:
        return (b.square() * h.view(b.shape[0], 1, -1)).sum(-1).flatten()
    return input_gram(b, gram).diagonal()


def input_gram(b: Tensor, gram: Tensor) -> Tensor:
    """`B G Bᵀ` `(I, I)`: the Gram matrix of what S multiplies."""
    return right_multiply(left_multiply(b.float(), gram), b.float().mT)


@dataclass(frozen=True, slots=True)
class _Resolve:
    """Cycles in the coordinates of `problem`: its target is the product that is to stay, B's columns are times `root`.

    With a grid they begin with a pass over S; without `resolve` they leave A and B.
    """

    problem: ExactProblem | HessianProblem
    root: Tensor
    grid: Grid | None
    resolve: bool

    @classmethod
    def of(
        cls,
        target: Tensor,
        h: Tensor,
        gram: Tensor | None,
        blocks: int,
        counts: Counter[str],
        grid: Grid | None,
        resolve: bool,
    ) -> _Resolve:
        if gram is not None:
            root = target.new_ones(blocks, 1, target.shape[1] // blocks)
            return cls(HessianProblem(target, gram, counts=counts), root, grid, resolve)
        root = (h / h.mean()).sqrt()
        return cls(ExactProblem(target * root, counts=counts), root.view(blocks, 1, -1), grid, resolve)

    def loss(self, factors: SparseFactors) -> float:
        """The loss of factors as they are stored, relative to Ŵ' = 0 (0 where the product itself is 0)."""
        return self.relative(self.problem.squared_error(self._scaled(factors)))

    def relative(self, loss: float) -> float:
        target = self.problem.target
        gram = self.problem.gram if isinstance(self.problem, HessianProblem) else None
        total = stable_sum(target.square()) if gram is None else hessian.quadratic_form(target, gram)
        return loss / total if total > 0 else 0.0

    def run(self, start: SparseFactors, iterations: int, on_progress: Progress | None) -> Requantized:
        """Cycles while they gain. What is returned, rounded to its dtype, is never worse than `start`."""
        losses, reason = [self.loss(start)], "iterations"
        now = best = self._scaled(start)
        for step in range(iterations):
            now = self._cycle(now)
            loss = self.relative(self.problem.squared_error(now))
            gain = losses[-1] - loss
            if gain > 0:
                best = now
                losses.append(loss)
                if on_progress is not None:
                    on_progress(step + 1, iterations, loss)
            if gain <= _TOLERANCE * losses[-1]:
                reason = "tolerance"
                break
        found = self._stored(start, best) if len(losses) > 1 else start
        if found is not start and not self.loss(found) < losses[0]:
            found, losses, reason = start, losses[:1], "rounding"
        return Requantized(found, tuple(losses), reason, dict(self.problem.counts))

    def _scaled(self, factors: SparseFactors) -> Factors:
        nothing = factors.core.new_empty(0)  # no step of A and B asks which mask a group has
        return Factors(factors.a.float(), factors.core.float(), factors.b.float() * self.root, nothing)

    def _stored(self, start: SparseFactors, best: Factors) -> SparseFactors:
        """What the cycles found, in the dtypes of `start`."""
        dtype, found = start.a.dtype, start
        if self.resolve:
            found = replace(start, a=best.a.to(dtype), b=(best.b / self.root).to(dtype))
        if self.grid is None or start.quantized is None:
            return found
        numbers = self.grid.nearest(kept(best.core, start.mask), _scales(start.quantized))
        values = replace(start.quantized, integers=numbers.to(start.quantized.integers.dtype))
        return replace(found, core=spread(values.dequantize(), start.mask), quantized=values)

    def _cycle(self, factors: Factors) -> Factors:
        """One pass over S, one step of A and one of B, each exact given the others, on a copy."""
        found = Factors(factors.a, factors.core, factors.b, factors.index)  # steps replace what they change
        if self.grid is not None:
            update_rounded(self.problem, found, self.grid)
        if not self.resolve:
            return found
        if isinstance(self.problem, HessianProblem):
            hessian.update_a(self.problem, found)
            hessian.update_b(self.problem, found)
        else:
            exact.update_a(self.problem, found)
            exact.update_b(self.problem, found)
        return found


def _gauged(
    factors: SparseFactors,
    squares: Tensor,
    rounded: Callable[[Tensor, Tensor], QuantizedValues],
    activations: str | None,
) -> SparseFactors:
    """The factors in the gauge whose rounded core is nearest to the one that is not rounded; unchanged where that is theirs."""

    def error(values: Tensor, weights: Tensor) -> float:
        return stable_sum(weights * (values - rounded(values, weights).dequantize()).square())

    scale = choose_gauge(factors, squares, error, integer_activations=activations == "int8")
    return factors if bool((scale == 1).all()) else apply_gauge(factors, scale)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Scales as `dtype` holds them, none of them zero, in float32."""
    limits = torch.finfo(dtype)
    return scale.to(dtype).float().clamp(min=limits.smallest_normal * limits.eps)


def _scales(found: QuantizedValues) -> Tensor:
    """The scale of each kept value, float32 `(O, I/2)`."""
    return found.scale.float().repeat_interleave(found.integers.shape[1] // found.scale.shape[1], dim=1)


def _gptq_rows(
    values: Tensor, gram: Tensor, columns: Tensor, start: Tensor, scale: Tensor, levels: tuple[int, int]
) -> Tensor:
    """`gptq` for a few rows: values and columns `(R, N)`, start int8 `(R, N)`, scale `(R, groups)`; int8 `(R, N)`."""
    count = values.shape[1]
    own = gram[columns[:, :, None], columns[:, None, :]]
    what, advice = "Hessians of rows' kept values", "raise `damping` or `shrinkage`"
    lower, _ = cholesky(own, what=what, advice=advice)
    upper = cholesky(torch.cholesky_inverse(lower), what=f"inverse {what}", advice=advice)[0].mT
    scales = scale.repeat_interleave(count // scale.shape[1], dim=1)
    left, found = values.clone(), torch.empty_like(values)
    for j in range(count):
        found[:, j] = nearest_number(left[:, j] / scales[:, j], *levels)
        error = (left[:, j] - found[:, j] * scales[:, j]) / upper[:, j, j]
        left[:, j:] -= error[:, None] * upper[:, j, j:]
    errors = [values - integers * scales for integers in (found, start.double())]
    better, worse = (torch.einsum("rn,rnm,rm->r", error, own, error) for error in errors)
    return torch.where((better < worse)[:, None], found.to(torch.int8), start)


def _check(
    factors: SparseFactors,
    second_moment: Tensor,
    gram: Tensor | None,
    num_bits: int,
    group_size: int | None,
    rounding: str,
) -> None:
    d_in = factors.mask.shape[1]
    if num_bits not in LEVELS:
        raise ValueError(f"{num_bits=} is not one of {', '.join(map(str, LEVELS))}")
    if group_size is not None and (group_size < 1 or (d_in // 2) % group_size):
        raise ValueError(f"{group_size=} does not divide the {d_in // 2} kept values of a row")
    if second_moment.shape != (d_in,) or (gram is not None and gram.shape != (d_in, d_in)):
        raise ValueError(
            f"second_moment must be (I,) and gram (I, I) with I = {d_in}, got {tuple(second_moment.shape)}"
        )
    if rounding == "gptq" and gram is None:
        raise ValueError("rounding='gptq' needs the Gram matrix of the inputs")
    if not all(bool(part.isfinite().all()) for part in (factors.a, factors.core, factors.b)):
        raise NumericalError("the factors hold numbers that are not finite")
