"""One group of S solved given everything else: least squares on every mask of the pattern, or on a few good ones.

With G the group's Gram matrix `(M, M)`, c its correlation with the group's own share put back, and `pivot` = G_A[r,r], mask m
offers `v_m = G[m,m]⁻¹ c_m / pivot`, which lowers the loss by `c_mᵀ G[m,m]⁻¹ c_m / pivot`. All masks are tried for M <= 8;
larger groups choose between the current mask and one found by elimination (`eliminate`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from armor_recipes.solver.patterns import Pattern, index_to_mask, mask_lanes
from armor_recipes.solver.spd import inverse_or_zero, with_ridge

#: A minor, scaled to a unit diagonal, with a squared Cholesky pivot below this counts as singular: its mask offers nothing.
_SINGULAR = 1e-6
#: Ridge of the Gram matrix that `eliminate` ranks entries by, as a share of its mean diagonal; values are solved without it.
_RIDGE = 1e-6


def solve_group(
    correlation: Tensor,
    gram: Tensor,
    values: Tensor,
    index: Tensor,
    pivot: Tensor,
    *,
    pattern: Pattern,
    fixed_mask: bool,
    inverses: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The best values and mask number of a batch of groups; the old ones where nothing offered lowers the loss.

    Args:
        correlation: of the error with the group's entries, `(..., M)`.
        gram: G, broadcastable to `(..., M, M)`.
        values: the group's current values `(..., M)`.
        index: the number of its mask `(...)`.
        pivot: G_A[r,r], broadcastable to `(..., 1)`. Where it is not positive nothing changes.
        pattern: N of M.
        fixed_mask: keep the mask, solve for its values.
        inverses: `minor_inverses(gram, pattern)`, where it was computed before.
    """
    share = (values[..., None] * gram).sum(-2)
    c = correlation + pivot * share
    lanes, numbers, inverses = _offers(c, gram, index, pattern, fixed_mask=fixed_mask, inverses=inverses)
    lanes = lanes.expand(*c.shape[:-1], -1, -1)
    picked = c[..., None, :].expand(*lanes.shape[:-1], -1).gather(-1, lanes)
    solutions = (inverses * picked[..., None, :]).sum(-1)
    gain = (solutions * picked).sum(-1)
    if fixed_mask:
        gain = torch.where(numbers == index[..., None], gain, -torch.inf)
    best = gain.argmax(-1, keepdim=True)
    safe = torch.where(pivot > 0, pivot, torch.ones_like(pivot))
    now = (values * (2 * c - pivot * share)).sum(-1, keepdim=True)
    better = (gain.gather(-1, best) / safe > now) & (pivot > 0)
    at = best[..., None].expand(*best.shape, pattern.keep)
    chosen = solutions.gather(-2, at)[..., 0, :] / safe
    new = torch.zeros_like(values).scatter_(-1, lanes.gather(-2, at)[..., 0, :], chosen)
    number = numbers.expand(gain.shape).gather(-1, best)[..., 0]
    return torch.where(better, new, values), torch.where(better[..., 0], number, index)


def _offers(
    c: Tensor, gram: Tensor, index: Tensor, pattern: Pattern, *, fixed_mask: bool, inverses: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The masks to choose from: kept entries `(..., C, N)`, numbers `(..., C)`, inverses `(..., C, N, N)`."""
    if pattern.has_table:
        lanes = torch.tensor(mask_lanes(pattern), device=c.device)
        numbers = torch.arange(len(lanes), device=c.device, dtype=index.dtype)
        return lanes, numbers, minor_inverses(gram, pattern) if inverses is None else inverses
    current = index_to_mask(index.flatten()[:, None], pattern).view(c.shape)
    masks = current[..., None, :]
    if not fixed_mask:
        masks = torch.stack((current, eliminate(c, gram, pattern.keep)), dim=-2)
    lanes = torch.sort(masks.byte(), dim=-1, descending=True, stable=True).indices[..., : pattern.keep]
    wide = gram.expand(*c.shape, -1)[..., None, :, :].expand(*masks.shape, -1)
    rows = wide.gather(-2, lanes[..., None].expand(*lanes.shape, pattern.group))
    minors = rows.gather(-1, lanes[..., None, :].expand(*lanes.shape, pattern.keep))
    return lanes, (torch.ones_like(lanes) << lanes).sum(-1), _inverses(minors)


def eliminate(c: Tensor, gram: Tensor, keep: int) -> Tensor:
    """Masks `(..., M)` that keep N of M entries, found by optimal brain surgery: all entries solved jointly, then one after
    the other dropped, each time the one that costs least with the others re-solved, `v_q² / [G⁻¹]_qq`. In float64.
    """
    inverse = torch.linalg.inv(with_ridge(gram.double().expand(*c.shape, -1), _RIDGE))
    values = (inverse * c.double()[..., None, :]).sum(-1)
    mask = torch.ones_like(c, dtype=torch.bool)
    for _ in range(c.shape[-1] - keep):
        diagonal = inverse.diagonal(dim1=-2, dim2=-1)
        cost = torch.where(mask & (diagonal > 0), values.square() / diagonal, torch.inf)
        drop = cost.argmin(-1, keepdim=True)
        column = inverse.gather(-1, drop[..., None, :].expand(*values.shape, 1))[..., 0]
        step = column / diagonal.gather(-1, drop)
        values = values - step * values.gather(-1, drop)
        inverse = inverse - step[..., :, None] * column[..., None, :]
        mask = mask.scatter(-1, drop, value=False)
    return mask


def minor_inverses(gram: Tensor, pattern: Pattern) -> Tensor:
    """`G[m,m]⁻¹` of Gram matrices `(..., M, M)` for every mask of a pattern with M <= 8: `(..., C, N, N)`; zero where singular."""
    lanes = torch.tensor(mask_lanes(pattern), device=gram.device)
    return _inverses(gram[..., lanes[:, :, None], lanes[:, None, :]])


def _inverses(minors: Tensor) -> Tensor:
    """Inverses of `(..., N, N)`, zero where singular or out of range; 2x2 in closed form, others by Cholesky in float64."""
    inverse = _pair_inverses(minors) if minors.shape[-1] == 2 else inverse_or_zero(minors, least_pivot=_SINGULAR)
    inverse = inverse.to(minors.dtype)
    finite = torch.isfinite(inverse).all(-1).all(-1)[..., None, None]
    return torch.where(finite, inverse, torch.zeros_like(inverse))


def _pair_inverses(minors: Tensor) -> Tensor:
    aa, ab, bb = minors[..., 0, 0], minors[..., 0, 1], minors[..., 1, 1]
    determinant = aa * bb - ab * ab
    regular = determinant > _SINGULAR * aa * bb
    scale = torch.where(regular, determinant, torch.ones_like(determinant)).reciprocal() * regular
    return torch.stack((bb * scale, -ab * scale, -ab * scale, aa * scale), dim=-1).reshape(minors.shape)
