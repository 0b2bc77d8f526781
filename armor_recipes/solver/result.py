"""What a solver returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from torch import Tensor

from armor_recipes.solver.blockdiag import fold


class StopReason(StrEnum):
    """Why an iteration ended."""

    ITERATIONS = "iterations"
    TOLERANCE = "tolerance"


@dataclass(frozen=True, slots=True)
class Factorization:
    """`Ŵ = A · S · B` for one weight `(O, I)`; norms are folded in, so Ŵ approximates the raw weight.

    Attributes:
        a: output factor A, float32 `(J, b_o, b_o)`.
        core: S, float32 `(O, I)`, zero outside `mask`.
        mask: bool `(O, I)`, exactly N kept entries in every M of a row.
        b: input factor B, float32 `(K, b_i, b_i)`.
        losses: best loss so far relative to Ŵ = 0, an entry an iteration; index 0 is NoWag-P.
        seconds: seconds since the start at each entry of `losses`.
        stop_reason: why the iteration ended.
        counts: how often something out of the ordinary was done (dead channels filled, jitter added).
    """

    a: Tensor
    core: Tensor
    mask: Tensor
    b: Tensor
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    stop_reason: StopReason
    counts: Mapping[str, int]

    def split(self, rows: Sequence[int]) -> list[Factorization]:
        """Factorizations of weights that were solved stacked along their rows, each with the same B; b_o divides each part."""
        size = self.a.shape[-1]
        parts = (
            self.a.split([count // size for count in rows]),
            self.core.split(list(rows)),
            self.mask.split(list(rows)),
        )
        return [
            replace(self, a=a.contiguous(), core=core.contiguous(), mask=mask.contiguous())
            for a, core, mask in zip(*parts, strict=True)
        ]

    def dense(self) -> Tensor:
        """Ŵ, float32 `(O, I)`."""
        return fold(self.a, self.core, self.b)


@dataclass(slots=True)
class Factors:
    """Working state of a solver in its own coordinates: A, S, B, and the masks of S's groups by number, `(O, I/M)`.

    `patterns.mask_to_index` numbers them.
    """

    a: Tensor
    core: Tensor
    b: Tensor
    index: Tensor

    def clone(self) -> Factors:
        """A copy that shares no memory."""
        return Factors(self.a.clone(), self.core.clone(), self.b.clone(), self.index.clone())
