"""The `hessian` objective: `tr((W̄ − A·S·B) G (W̄ − A·S·B)ᵀ)` with G `(I, I)`, the inputs' Gram matrix (see `docs/solver.md`).

`regularize` makes G from H = XXᵀ/n, `choose_shrinkage` finds its λ on tokens held out, `HessianProblem` goes to
`exact.solve_exact`. Nothing here is scaled by √h: G holds the scales.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from armor_recipes.errors import NumericalError
from armor_recipes.solver.blockdiag import left_multiply, right_multiply
from armor_recipes.solver.exact import factor_normal, finite_loss, from_blocks, residual, solve_normal, to_blocks
from armor_recipes.solver.normalize import fill_dead_channels, normalized, share_of
from armor_recipes.solver.patterns import TWO_OF_FOUR, Pattern
from armor_recipes.solver.result import Factors
from armor_recipes.solver.rows import stable_sum
from armor_recipes.solver.spd import cholesky
from armor_recipes.solver.sweep import SweepProblem, sweep

#: Columns that a sweep takes at once, at least. Narrower panels make thin products with G, wider ones leave more to the sweep.
_PANEL = 192
#: Rows of a Gram matrix that are converted to float64 at once.
_ROWS = 512


@dataclass(slots=True)
class HessianProblem:
    """The target W̄ `(O, I)`, the regularised Gram matrix G `(I, I)` of the same dtype, and how it may be solved."""

    target: Tensor
    gram: Tensor
    fixed_mask: bool = False
    native: bool | None = None
    counts: Counter[str] = field(default_factory=Counter)
    pattern: Pattern = TWO_OF_FOUR

    def cycle(self, factors: Factors) -> Factors:
        """One pass over S (all groups, masks included), A and B, each step exact given the others; in place."""
        update_core(self, factors)
        update_a(self, factors)
        update_b(self, factors)
        return factors

    def squared_error(self, factors: Factors) -> float:
        """`tr(E G Eᵀ)`, products in the problem's dtype, summed in float64. Raises NumericalError where it is not finite."""
        return finite_loss(quadratic_form(residual(self, factors), self.gram))


def regularize(gram: Tensor, *, shrinkage: float, damping: float) -> tuple[Tensor, int]:
    """`(1−λ) H + λ diag(h) + damping · mean(h) · I`, scaled to a mean diagonal of 1; and how many dead channels were filled.

    Args:
        gram: H `(I, I)`, mean of x xᵀ over the calibration tokens, exactly symmetric; its diagonal is h.
        shrinkage: λ in [0, 1]: 0 keeps the correlations as they are, 1 drops them (the `diagonal` objective).
        damping: share of the mean of h added to the diagonal.

    Raises:
        ValueError: numbers or shapes that do not fit, or an H that is not symmetric.
        NumericalError: values that are not finite, or a negative diagonal entry.
    """
    if not 0 <= shrinkage <= 1 or not 0 <= damping < math.inf:
        raise ValueError(f"{shrinkage=} must lie in [0, 1], and {damping=} must be finite and not negative")
    _check_gram(gram)
    h, dead = fill_dead_channels(gram.diagonal().double())
    mean = float(h.mean())
    scale = 1 / regular_scale(gram, damping=damping)
    regular = gram * ((1 - shrinkage) * scale)
    regular.diagonal().copy_((h + damping * mean) * scale)
    return regular, dead


def regular_scale(gram: Tensor, *, damping: float) -> float:
    """What `regularize` divides by: the mean diagonal of the damped H `(I, I)`, dead channels filled."""
    return float(fill_dead_channels(gram.diagonal().double())[0].mean()) * (1 + damping)


def choose_shrinkage(splits: Iterable[tuple[Tensor, Tensor]]) -> float:
    """The λ in [0, 1] whose shrunk correlations are closest to those of tokens held out, over all splits.

    Minimises `Σ_{i≠j} ((1−λ) R_ij − R'_ij)²` with `R_ij = H_ij / √(h_i h_j)` of the tokens of a split and R' the same of
    those held out for it, by h of the former: `1−λ = Σ R_ij R'_ij / Σ R_ij²`, cut to [0, 1]. Dead channels take no
    part. Held-out tokens must be in neither what they are held out for nor any test text.

    Args:
        splits: H `(I, I)` of some tokens and H `(I, I)` of the held-out ones, once or more; one pair is looked at after the other.

    Raises:
        ValueError: shapes that do not fit, or an H that is not symmetric.
        NumericalError: values that are not finite.
    """
    own = other = 0.0
    for fit, held_out in splits:
        if fit.shape != held_out.shape:
            raise ValueError(
                f"the Gram matrices must have one shape, got {tuple(fit.shape)} and {tuple(held_out.shape)}"
            )
        for gram in (fit, held_out):
            _check_gram(gram)
        fill_dead_channels(held_out.diagonal())
        own += _correlation_product(fit, fit)
        other += _correlation_product(fit, held_out)
    return 1.0 if own == 0 else 1 - min(1.0, max(0.0, other / own))


def matched_weight(weight: Tensor, gram: Tensor, cross: Tensor, regular: Tensor) -> Tensor:
    """`W (C + G − H) G⁻¹` `(O, I)`: with it in W's place the `hessian` loss is `‖W X − Ŵ X̂‖²` up to a constant.

    Args:
        weight: W `(O, I)`.
        gram: H = X̂X̂ᵀ/n `(I, I)` of the compressed model's inputs.
        cross: C = XX̂ᵀ/n `(I, I)`, the dense model's inputs with them.
        regular: G, what `regularize` made of H, in H's scale. `C = H` gives W back.

    Solved in float64. Raises NumericalError where G is not positive definite.
    """
    g = regular.double()
    inputs = cross.to(torch.float64, copy=True).add_(g).sub_(gram.double())  # in place: these are the largest there are
    right = (weight.double() @ inputs).T
    del inputs
    factor, _ = cholesky(g, what="regularised Gram matrices of the inputs", advice="raise `damping` or `shrinkage`")
    return torch.cholesky_solve(right, factor).T.to(weight.dtype).contiguous()


def matched_loss(weight: Tensor, dense: Tensor, cross: Tensor, gram: Tensor, approximation: Tensor) -> float:
    """`‖W X − Ŵ X̂‖² / ‖W X‖²` for raw W and Ŵ `(O, I)`, in float64; arguments as in `matched_weight`, dense is XXᵀ/n."""
    w, v = weight.double(), approximation.double()
    total = stable_sum(w * (w @ dense.double()))
    error = total - 2 * stable_sum(v * (w @ cross.double())) + stable_sum(v * (v @ gram.double()))
    return share_of(max(error, 0.0), total)


def hessian_loss(
    weight: Tensor,
    gram: Tensor,
    approximation: Tensor,
    *,
    normalize: bool = True,
    row_weights: Tensor | None = None,
) -> float:
    """`tr(Δ G Δᵀ) / tr(W̄ G W̄ᵀ)` with `Δ = W̄ − D_r⁻¹ Ŵ D_c⁻¹`, for raw W and Ŵ `(O, I)` and G `(I, I)`, in float64.

    With `row_weights` `(O,)` each row's share counts so many times in both sums.
    0 is a perfect reconstruction, 1 is Ŵ = 0. G is taken as it is: pass it through `regularize` before.
    """
    normal = normalized(weight.double(), normalize=normalize, row_weights=row_weights)
    error = normal.weight - approximation.double() / normal.columns / normal.rows[:, None]
    gram = gram.double()
    return share_of(quadratic_form(error, gram), quadratic_form(normal.weight, gram))


def quadratic_form(error: Tensor, gram: Tensor) -> float:
    """`tr(E G Eᵀ)` of E `(O, I)`, products in E's dtype, summed in float64; rounding alone cannot make it negative."""
    return max(stable_sum(error * (error @ gram)), 0.0)  # in this order NaN stays NaN


def update_core(problem: HessianProblem, factors: Factors) -> None:
    """One sweep over all groups of S: panel of columns after panel, in each all rows of A's blocks in order.

    B is block-diagonal, so what a panel changes in `E = W̄ − A·S·B` lies in the panel. With E kept current that way a panel
    needs its own correlation `Aᵀ (E G[:, c]) B_cᵀ` and its own `B_c G[c, c] B_cᵀ` alone, and a sweep costs one product
    with G. Any order of the groups is a Gauss-Seidel sweep; this one leaves all but small blocks to the matrix library.
    """
    gram_a = torch.bmm(factors.a.mT, factors.a).contiguous()
    error = residual(problem, factors)
    core, index = factors.core.clone(), factors.index.clone()
    group = problem.pattern.group
    for columns, blocks in panels(factors, group):
        b, numbers = factors.b[blocks], slice(columns.start // group, columns.stop // group)
        correlation = left_multiply(factors.a.mT, right_multiply(error @ problem.gram[:, columns], b.mT))
        gram_b = right_multiply(left_multiply(b, problem.gram[columns, columns]), b.mT)
        work = _panel(problem, correlation, core[:, columns], index[:, numbers], gram_a, gram_b)
        sweep(work, native=problem.native)
        swept = from_blocks(work.core)
        error[:, columns] -= left_multiply(factors.a, right_multiply(swept - core[:, columns], b))
        core[:, columns], index[:, numbers] = swept, from_blocks(work.index)
    factors.core, factors.index = core, index


def update_a(problem: HessianProblem, factors: Factors) -> None:
    """`A_j += (E_j G T_jᵀ)(T_j G T_jᵀ + εI)⁻¹` with `T = S · B`."""
    size = factors.a.shape[-1]
    t = right_multiply(factors.core, factors.b)
    e = problem.target - left_multiply(factors.a, t)
    t_blocks, e_blocks, tg_blocks = (x.reshape(-1, size, x.shape[1]) for x in (t, e, t @ problem.gram))
    gram = torch.bmm(tg_blocks, t_blocks.mT)
    factors.a = factors.a + solve_normal(gram, torch.bmm(tg_blocks, e_blocks.mT), problem.counts).mT


def update_b(problem: HessianProblem, factors: Factors) -> None:
    """`B_k += (U_kᵀU_k + εI)⁻¹ U_kᵀ (E G)[:, k] (G_kk + εI)⁻¹`, one k after the other with E current; `U = A · S`.

    Each step is the exact minimiser over its B_k. One pass is not the joint minimum, unless G is block-diagonal.
    """
    u = left_multiply(factors.a, factors.core)
    error = problem.target - right_multiply(u, factors.b)
    blocks, size, _ = factors.b.shape
    u_blocks = u.reshape(-1, blocks, size).transpose(0, 1)
    left = factor_normal(torch.bmm(u_blocks.mT, u_blocks), problem.counts)
    right = factor_normal(diagonal_blocks(problem.gram, size), problem.counts)
    steps = []
    for k in range(blocks):
        columns = slice(k * size, (k + 1) * size)
        slope = u_blocks[k].T @ (error @ problem.gram[:, columns])
        half = torch.cholesky_solve(slope.double(), left[k])
        steps.append(torch.cholesky_solve(half.T, right[k]).T.to(u.dtype))
        error[:, columns] -= u_blocks[k] @ steps[k]
    factors.b = factors.b + torch.stack(steps)


def diagonal_blocks(gram: Tensor, size: int) -> Tensor:
    """The blocks on the diagonal of `(K·size, K·size)`: `(K, size, size)`."""
    blocks: Tensor = gram.unflatten(1, (-1, size)).unflatten(0, (-1, size)).diagonal(dim1=0, dim2=2).movedim(-1, 0)
    return blocks


def panels(factors: Factors, group: int) -> Iterator[tuple[slice, slice]]:
    """Columns of S and blocks of B of each panel: whole blocks and whole groups, `_PANEL` columns or a little more."""
    size, d_in = factors.b.shape[-1], factors.core.shape[1]
    unit = math.lcm(size, group)
    width = unit * math.ceil(_PANEL / unit)
    for start in range(0, d_in, width):
        stop = min(start + width, d_in)
        yield slice(start, stop), slice(start // size, stop // size)


def _panel(
    problem: HessianProblem, correlation: Tensor, core: Tensor, index: Tensor, gram_a: Tensor, gram_b: Tensor
) -> SweepProblem:
    """A panel `(O, w)` as a sweep over J blocks of all its columns, on copies."""
    rows = gram_a.shape[-1]
    return SweepProblem(
        correlation=to_blocks(correlation, rows, correlation.shape[1]),
        core=to_blocks(core, rows, core.shape[1]).clone(),
        index=to_blocks(index, rows, index.shape[1]).clone(),
        gram_a=gram_a,
        gram_b=gram_b[None].contiguous(),
        fixed_mask=problem.fixed_mask,
        pattern=problem.pattern,
    )


def _correlation_product(fit: Tensor, other: Tensor) -> float:
    """`Σ_{i≠j} R_ij R'_ij`, both scaled by the diagonal of `fit`, in float64 and a few rows at a time."""
    h = fit.diagonal().double()
    scale = torch.where(h > 0, h.reciprocal(), torch.zeros_like(h))
    total = 0.0
    for start in range(0, len(h), _ROWS):
        rows = slice(start, start + _ROWS)
        product = fit[rows].double() * other[rows].double() * scale[rows, None] * scale
        product[:, rows].diagonal().zero_()
        total += stable_sum(product)
    return total


def _check_gram(gram: Tensor) -> None:
    """Raise unless the Gram matrix is square, finite and exactly symmetric."""
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"the Gram matrix must be (I, I), got {tuple(gram.shape)}")
    bad = int((~gram.isfinite()).sum())
    if bad:
        raise NumericalError(f"{bad} of {gram.numel()} entries of the Gram matrix are not finite")
    if not torch.equal(gram, gram.T):
        raise ValueError("the Gram matrix is not exactly symmetric: average it with its transpose")
