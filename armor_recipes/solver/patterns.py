"""The 2:4 pattern: two kept values in every four consecutive entries of a row."""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

GROUP = 4
KEPT = 2
#: The six masks of 2:4 as index pairs, in the order in which ties are broken: lower indices first.
PAIRS: tuple[tuple[int, int], ...] = tuple((a, b) for a, b in combinations(range(GROUP), KEPT))
PATTERNS = ("2:4",)


def pair_table(device: torch.device | None = None) -> Tensor:
    """The six masks as a `(6, 4)` bool table, in the order of `PAIRS`."""
    table = torch.zeros(len(PAIRS), GROUP, dtype=torch.bool)
    for row, pair in enumerate(PAIRS):
        table[row, list(pair)] = True
    return table.to(device)


def magnitude_mask(scores: Tensor) -> Tensor:
    """Keep the two largest scores of each group of four of `(O, I)`, ties to the lower index; returns bool `(O, I)`."""
    groups = scores.unflatten(1, (-1, GROUP))
    order = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., :KEPT]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, order, value=True).flatten(1)


def mask_to_index(mask: Tensor) -> Tensor:
    """Index into `PAIRS` of each group of a 2:4 mask `(O, I)`; uint8 `(O, I/4)`. Raises ValueError if a group is not 2:4."""
    groups = mask.unflatten(1, (-1, GROUP))
    if not bool((groups.sum(-1) == KEPT).all()):
        raise ValueError("mask: every group of 4 consecutive entries of a row must keep exactly 2")
    code = (groups * torch.tensor([1, 2, 4, 8], device=mask.device)).sum(-1)
    lookup = torch.zeros(16, dtype=torch.uint8)
    for index, (first, second) in enumerate(PAIRS):
        lookup[(1 << first) | (1 << second)] = index
    return lookup.to(mask.device)[code]


def index_to_mask(index: Tensor) -> Tensor:
    """Inverse of `mask_to_index`: uint8 `(O, I/4)` to bool `(O, I)`."""
    return pair_table(index.device)[index.long()].flatten(1)
