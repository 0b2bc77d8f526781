"""N:M patterns: N kept values in every M consecutive entries of a row. The masks of a group, and their numbering.

A group of at most `TABLE_GROUP` entries numbers its masks in lexicographic order (2:4: 01, 02, 03, 12, 13, 23), so that
all can be tried and ties go to lower indices. In a larger group a mask's number is its bits: bit i is entry i.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from armor_recipes.solver.rows import parts

#: The largest group, and the largest whose masks are numbered, stored and tried one by one.
MAX_GROUP, TABLE_GROUP = 32, 8


@dataclass(frozen=True, slots=True)
class Pattern:
    """`keep` (N) values in every `group` (M) consecutive entries of a row. Raises ValueError unless 1 <= N < M <= 32."""

    keep: int
    group: int

    def __post_init__(self) -> None:
        if not 1 <= self.keep < self.group <= MAX_GROUP:
            raise ValueError(
                f"pattern {self} must keep N of every M entries with 1 <= N < M <= {MAX_GROUP}, such as 2:4 or 4:8"
            )

    def __str__(self) -> str:
        return f"{self.keep}:{self.group}"

    @property
    def sparsity(self) -> float:
        """The share of the values that it prunes."""
        return 1 - self.keep / self.group

    @property
    def has_table(self) -> bool:
        """Whether the masks of a group are numbered in lexicographic order and can all be tried (M <= 8)."""
        return self.group <= TABLE_GROUP


TWO_OF_FOUR = Pattern(2, 4)


def parse_pattern(text: str) -> Pattern:
    """`"N:M"` as a Pattern. Raises ValueError that says what is allowed."""
    found = re.fullmatch(r"([0-9]{1,2}):([0-9]{1,2})", text)
    if found is None:
        raise ValueError(f"pattern={text!r} is not of the form N:M (keep N of every M entries), such as 2:4 or 4:8")
    return Pattern(int(found[1]), int(found[2]))


@functools.cache
def mask_lanes(pattern: Pattern) -> tuple[tuple[int, ...], ...]:
    """The masks of a group with M <= 8 as tuples of kept entries, in the order of their numbers."""
    if not pattern.has_table:
        raise ValueError(f"the masks of pattern {pattern} are not listed: that is for groups of at most {TABLE_GROUP}")
    return tuple(combinations(range(pattern.group), pattern.keep))


def mask_table(pattern: Pattern = TWO_OF_FOUR, device: torch.device | None = None) -> Tensor:
    """The masks of a group with M <= 8 as bool `(masks, M)`, in the order of their numbers."""
    lanes = torch.tensor(mask_lanes(pattern), device=device)
    table: Tensor = (lanes[:, :, None] == torch.arange(pattern.group, device=device)).any(1)
    return table


def magnitude_mask(scores: Tensor, pattern: Pattern = TWO_OF_FOUR) -> Tensor:
    """Keep the N largest scores of each group of M of `(O, I)`, ties to the lower index; returns bool `(O, I)`."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for part in parts(scores):
        groups = scores[part].unflatten(1, (-1, pattern.group))
        order = torch.sort(groups, dim=-1, descending=True, stable=True).indices[..., : pattern.keep]
        mask[part].unflatten(1, (-1, pattern.group)).scatter_(-1, order, value=True)
    return mask


def mask_to_index(mask: Tensor, pattern: Pattern = TWO_OF_FOUR) -> Tensor:
    """The number of each group's mask, `(O, I/M)`, of a mask `(O, I)`: uint8 where M <= 8, else int64 of its bits.

    Raises ValueError if a group does not keep exactly N.
    """
    values, number_of = _bit_values(pattern, mask.device), _numbers(pattern, mask.device)
    found = []
    for part in parts(mask):
        groups = mask[part].unflatten(1, (-1, pattern.group))
        if not bool((groups.sum(-1) == pattern.keep).all()):
            raise ValueError(
                f"mask: every group of {pattern.group} consecutive entries of a row must keep exactly {pattern.keep}"
            )
        bits: Tensor = (groups * values).sum(-1)
        found.append(bits if number_of is None else number_of[bits])
    return torch.cat(found)


def _numbers(pattern: Pattern, device: torch.device) -> Tensor | None:
    """The number of a mask by its bits, uint8 `(2^M,)`; None where masks are not listed."""
    if not pattern.has_table:
        return None
    number_of = torch.zeros(1 << pattern.group, dtype=torch.uint8, device="cpu")
    for number, lanes in enumerate(mask_lanes(pattern)):
        number_of[sum(1 << lane for lane in lanes)] = number
    return number_of.to(device)


def index_to_mask(index: Tensor, pattern: Pattern = TWO_OF_FOUR) -> Tensor:
    """Inverse of `mask_to_index`: `(O, I/M)` to bool `(O, I)`."""
    if pattern.has_table:
        return mask_table(pattern, index.device)[index.long()].flatten(1)
    return ((index[..., None] & _bit_values(pattern, index.device)) != 0).flatten(1)


def _bit_values(pattern: Pattern, device: torch.device) -> Tensor:
    return torch.ones(pattern.group, dtype=torch.int64, device=device) << torch.arange(pattern.group, device=device)
