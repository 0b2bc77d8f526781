"""What a solver returns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
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
        masks_changed: the share of groups whose mask is not the one of the start, 0 to 1; of what was solved together, if split.
    """

    a: Tensor
    core: Tensor
    mask: Tensor
    b: Tensor
    losses: tuple[float, ...]
    seconds: tuple[float, ...]
    stop_reason: StopReason
    counts: Mapping[str, int]
    masks_changed: float = 0.0

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


@dataclass(frozen=True, slots=True)
class QuantizedValues:
    """The kept values of a core as integers: each is its integer times the scale of its group.

    A group is so many kept values of one row, from left to right; every row has equally many groups.

    Attributes:
        integers: int8 `(O, I/2)`, -128 to 127 with 8 bits, -8 to 7 with 4; or float8_e4m3fn, with 8 bits.
        scale: `(O, groups)`, positive, in the dtype in which it is stored.
        num_bits: 8 or 4.
        activations: what the entries of Bx are rounded to as a layer runs, with one scale a token: `int8` or `fp8`; None leaves
            them. It changes nothing of the weight that the factors give.
    """

    integers: Tensor
    scale: Tensor
    num_bits: int
    activations: str | None = None

    def dequantize(self) -> Tensor:
        """The values, float32 `(O, I/2)`: exact where the scales are bfloat16 or float16."""
        groups = self.integers.float().unflatten(1, (self.scale.shape[1], -1))
        values: Tensor = (groups * self.scale.float()[..., None]).flatten(1)
        return values


@dataclass(frozen=True, slots=True)
class SparseFactors:
    """`A · S · B` as it is stored: A `(J, b_o, b_o)`, S and its mask (bool) `(O, I)`, B `(K, b_i, b_i)`.

    `quantized` holds the kept values of S as integers, row by row; None where they are floats.
    """

    a: Tensor
    core: Tensor
    mask: Tensor
    b: Tensor
    quantized: QuantizedValues | None = None

    @classmethod
    def stack(cls, parts: Sequence[SparseFactors]) -> SparseFactors:
        """Factors with the same B and float cores, stacked along their rows."""
        if len(parts) == 1:
            return parts[0]
        a, core, mask = (torch.cat([getattr(part, name) for part in parts]) for name in ("a", "core", "mask"))
        return cls(a, core, mask, parts[0].b)

    def split(self, rows: Sequence[int]) -> list[SparseFactors]:
        """Undo `stack`, by the numbers of rows; each part has the same B."""
        blocks = [count // self.a.shape[-1] for count in rows]
        parts = zip(self.a.split(blocks), self.core.split(list(rows)), self.mask.split(list(rows)), strict=True)
        values: list[QuantizedValues | None] = [None] * len(rows)
        if self.quantized is not None:
            both = (self.quantized.integers.split(list(rows)), self.quantized.scale.split(list(rows)))
            values = [
                replace(self.quantized, integers=integers, scale=scale) for integers, scale in zip(*both, strict=True)
            ]
        return [
            SparseFactors(a, core, mask, self.b, found) for (a, core, mask), found in zip(parts, values, strict=True)
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
