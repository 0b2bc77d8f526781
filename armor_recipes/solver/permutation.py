"""Permute columns before N:M pruning, so that the masks keep more: channels of a hidden layer have no order of their own.

Greedy swaps of columns between groups, as in "Channel Permutations for N:M Sparsity" (Pool & Yu, NeurIPS 2021), all
pairs of columns scored at once and swaps of disjoint groups made together.
"""

from __future__ import annotations

import torch
from torch import Tensor

from armor_recipes.solver.entry import checked_finite
from armor_recipes.solver.normalize import fill_dead_channels, nowag_normalize
from armor_recipes.solver.patterns import TWO_OF_FOUR, Pattern, magnitude_mask
from armor_recipes.solver.rows import stable_sum

#: Exchanges that are scored at once: their sums stay in a core's cache, and torch does not split an operation of that few
#: numbers over threads, which would cost more than the operation.
_AT_ONCE = (1 << 15) - 1
#: A swap counts if it adds more than this share of all scores, and a sweep if it adds more than this share of all gains.
_SMALLEST_GAIN, _SMALLEST_SWEEP = 1e-8, 0.02


def weighted_channels(weight: Tensor, second_moment: Tensor) -> Tensor:
    """W̄_ij · √h_j, float32 `(O, I)`: its squares are NoWag-P's scores. Raises NumericalError for values that are not finite."""
    h, _ = fill_dead_channels(second_moment.float())
    return nowag_normalize(checked_finite(weight.float())).weight * (h / h.mean()).sqrt()


def kept_share(scores: Tensor, *, pattern: Pattern = TWO_OF_FOUR) -> float:
    """The share of scores `(O, I)` that the best N:M mask keeps; 1 where all are zero. NoWag-P's relative loss is the rest."""
    total = stable_sum(scores)
    return stable_sum(scores * magnitude_mask(scores, pattern)) / total if total > 0 else 1.0


def choose_permutation(scores: Tensor, *, pattern: Pattern = TWO_OF_FOUR, sweeps: int = 10) -> Tensor:
    """Columns in an order that lets the best N:M mask keep more of scores `(O, I)`: int64 `(I,)`, new column i is old p[i].

    Columns sorted by their sums are dealt out to the groups in turn. Then each sweep scores every exchange of two columns
    between two groups exactly, and makes the best ones that touch no group twice; sweeps end at a local optimum, when one
    adds less than 2 % of what all have added, or after `sweeps`. The result is never below the identity, which is
    returned where nothing better is found. Groups are in the order of their first columns, columns within ascending.

    Costs I² · O operations for the first sweep, and 8 · I · O for each swap made. Nothing is drawn at random.

    Raises ValueError where the columns are no whole groups.
    """
    size = pattern.group
    columns = scores.shape[1]
    if columns % size:
        raise ValueError(f"pattern {pattern} needs a multiple of {size} columns, got {columns}")
    identity = torch.arange(columns, device=scores.device)
    scale = stable_sum(scores)
    if columns == size or not scale > 0:
        return identity
    scores = scores.float() / scale
    dealt = _dealt(scores, size)
    start = max(identity, dealt, key=lambda order: kept_share(scores[:, order], pattern=pattern))
    found = start[_swapped(scores[:, start], pattern, sweeps)]
    groups = found.view(-1, size).sort(dim=1).values
    found = groups[groups[:, 0].argsort()].flatten()
    return max(identity, found, key=lambda order: kept_share(scores[:, order], pattern=pattern))


def gather_alike(channels: Tensor, order: Tensor, *, pattern: Pattern = TWO_OF_FOUR, block: int) -> Tensor:
    """The groups of `order` `(I,)` in another sequence: those whose columns resemble each other share a block of `block` columns.

    A block of B combines its columns, so what a mask drops is mended best by columns that point the same way. Likeness is
    the squared cosine of two columns of `channels` `(O, I)`, summed over pairs of columns of two groups. A block begins
    with the group that is most like all that are left, and takes what is most like it so far, one by one.

    Raises ValueError where the blocks are no whole groups, or the columns no whole blocks.
    """
    if block % pattern.group or len(order) % block:
        raise ValueError(f"{block=} must be a multiple of {pattern.group} that divides the {len(order)} columns")
    groups = order.view(-1, pattern.group)
    unit = torch.nn.functional.normalize(channels[:, order].double(), dim=0)
    likeness = (unit.T @ unit).square().unflatten(0, groups.shape).unflatten(2, groups.shape).sum((1, 3))
    left = torch.ones(len(groups), dtype=torch.bool, device=order.device)
    sequence: list[int] = []
    near = likeness[0]
    for place in range(len(groups)):
        start = place % (block // pattern.group) == 0
        near = (likeness * left).sum(1) if start else near
        nearest = int(near.masked_fill(~left, -1.0).argmax())
        near = likeness[nearest] if start else near + likeness[nearest]
        left[nearest] = False
        sequence.append(nearest)
    return groups[sequence].flatten()


def _dealt(scores: Tensor, size: int) -> Tensor:
    """Columns by falling sum, dealt to the groups back and forth, so that each group has its share of large ones."""
    rounds = torch.argsort(scores.double().sum(0), descending=True, stable=True).view(size, -1).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.flatten()


def _swapped(scores: Tensor, pattern: Pattern, sweeps: int) -> Tensor:
    """The order of columns after up to `sweeps` sweeps of swaps."""
    size, columns = pattern.group, scores.shape[1]
    x = scores.contiguous()
    order = torch.arange(columns, device=x.device)
    changed = torch.arange(columns // size, device=x.device)
    kept = torch.zeros(columns, columns, device=x.device)
    gained = 0.0
    for _ in range(sweeps):
        rows = (changed[:, None] * size + torch.arange(size, device=x.device)).flatten()
        kept[rows] = _kept_with(*_others(x.unflatten(1, (-1, size))[:, changed], pattern.keep), x)
        left, right, gain = _disjoint_swaps(kept, size)
        gained += gain
        if not len(left) or gain < _SMALLEST_SWEEP * gained:
            break
        swap = torch.arange(columns, device=x.device)
        swap[left], swap[right] = right, left
        order, x, kept = order[swap], x[:, swap].contiguous(), kept[:, swap]
        changed = (torch.cat((left, right)) // size).sort().values
    return order


def _others(groups: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """For each entry of groups `(O, G, M)`, of the M−1 others: the N-th largest, and the sum of those above it, `(O, G·M)`.

    With x in the entry's place the group keeps `sum + max(N-th largest, x)`.
    """
    top, which = torch.sort(groups, dim=-1, descending=True, stable=True)
    rank = torch.argsort(which, dim=-1)
    inside = rank < keep
    nth = torch.where(inside, top[..., keep : keep + 1], top[..., keep - 1 : keep])
    above = torch.where(inside, top[..., :keep].sum(-1, True) - groups, top[..., : keep - 1].sum(-1, True))
    return nth.flatten(1), above.flatten(1)


def _kept_with(nth: Tensor, above: Tensor, x: Tensor) -> Tensor:
    """What entry r's group keeps with column j of x `(O, I)` in r's place, summed over rows: `(R, I)`."""
    parts = []
    for chunk in nth.split(max(1, _AT_ONCE // x.shape[1]), dim=1):
        total = x.new_zeros(chunk.shape[1], x.shape[1])
        larger = torch.empty_like(total)
        for row, values in zip(chunk, x, strict=True):
            total += torch.maximum(row[:, None], values, out=larger)
        parts.append(total)
    return torch.cat(parts) + above.sum(0)[:, None]


def _disjoint_swaps(kept: Tensor, size: int) -> tuple[Tensor, Tensor, float]:
    """Pairs of columns to exchange, each column's best partner, the best pairs first, no group twice; and their gain."""
    now = kept.diagonal()
    gain = kept + kept.T - now[:, None] - now
    gain.unflatten(0, (-1, size)).unflatten(2, (-1, size)).diagonal(dim1=0, dim2=2).zero_()
    best, partner = gain.max(1)
    order = torch.argsort(best, descending=True, stable=True)
    gains, partners = best.tolist(), partner.tolist()
    taken: set[int] = set()
    pairs: list[tuple[int, int]] = []
    for column in order.tolist():
        groups = {column // size, partners[column] // size}
        if gains[column] <= _SMALLEST_GAIN:
            break
        if not taken & groups:
            taken |= groups
            pairs.append((column, partners[column]))
    found = torch.tensor(pairs, dtype=torch.int64, device=kept.device).view(-1, 2)
    return found[:, 0], found[:, 1], sum(gains[column] for column, _ in pairs)
