"""Means over a module's inputs, accumulated batch by batch."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Self

import torch
from torch import Tensor

from armor_recipes.calibration.state import Identity, StatisticState, check_same
from armor_recipes.errors import NumericalError

#: Values whose squares are summed at once, so that a large batch does not need several times its memory.
_CHUNK = 1 << 22
#: Of those as many are float64 at once on a CPU, whole columns of the chunk: 16 MB, the last block less than twice that.
#: Smaller ones gain little more on a quiet machine, and on a busy one threads wait for each other too often.
_BLOCK = 1 << 21
#: Columns of such a block are a multiple of this, and of every vector width: so a column is summed as it is in the whole chunk.
_COLUMNS = 128
#: Rows summed in float32 by one product of `InputGram`: its rounding error, about 1e-6, does not grow with the number of tokens.
_GRAM_ROWS = 2048
#: Rows of a Gram matrix that are averaged with the transpose at once, so that no second float64 matrix is made for it.
_READ_ROWS = 256

#: Tokens from which on the mean squares of a few inputs are better for these than those of many others.
ENOUGH_TOKENS = 128


class _InputMean(ABC):
    """A mean over a module's input rows, accumulated in float64 on the device of the inputs.

    Nothing waits for the device before a value is read. Each chunk of rows adds one share to the sum, in the order in which they
    come: the same calls give the same bits.
    """

    def __init__(self, name: str, d_in: int) -> None:
        self.name = name
        self.d_in = d_in
        self._tokens = 0
        self._sum: Tensor | None = None

    @property
    def tokens(self) -> int:
        """Input rows seen so far."""
        return self._tokens

    @property
    def full_bytes(self) -> int:
        """Memory of its sum once it has seen a row."""
        return 8 * math.prod(self._shape())

    @property
    def enough_tokens(self) -> int:
        """From how many tokens on an expert's own is better than that of all experts of its layer, by measurement (experts.md)."""
        return ENOUGH_TOKENS

    def update(self, x: Tensor) -> None:
        """Take inputs `(..., I)` of any floating dtype. Raises ValueError if the last dimension is not `d_in`."""
        if x.ndim == 0 or x.shape[-1] != self.d_in:
            raise ValueError(
                f"inputs of {self.name} have shape {tuple(x.shape)}; the last dimension must be {self.d_in}"
            )
        rows = x.detach().reshape(-1, self.d_in)
        for chunk in torch.split(rows, self._rows_at_once()):
            share = self._share(chunk)
            self._sum = share if self._sum is None else self._sum.add_(share.to(self._sum.device))
        self._tokens += rows.shape[0]

    @property
    def identity(self) -> Identity:
        """Class, module and width."""
        return type(self).__name__, self.name, self.d_in

    def merge(self, other: Self) -> None:
        """Take all that another one has seen of the same module, after all that this one has. The other stays as it is.

        Its sum is added as one share. So one statistic for each of several updates, none of more rows than a chunk, merged in
        their order, have the bits of one that took them all; of longer pieces the sum is another one by the rounding of
        float64, about 1e-16 for each share, and the same whenever the pieces and their order are.

        Raises ValueError where the other one is of another kind, module or width.
        """
        check_same(self.identity, other.identity)
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum.add_(other._sum.to(self._sum.device))
        self._tokens += other._tokens

    def state(self) -> StatisticState:
        """All that was seen, bit for bit."""
        tensors = {} if self._sum is None else {"sum": self._sum}
        return StatisticState(type(self).__name__, self.name, {"d_in": self.d_in, "tokens": self._tokens}, tensors)

    def load_state(self, state: StatisticState) -> None:
        """Go on from what `state` gave, of a statistic of the same kind, module and width. Its tensors are copied.

        Raises ValueError where it is of another one, or this one has seen something already.
        """
        check_same(self.identity, (state.kind, state.module, state.number("d_in")))
        found = state.tensors.get("sum")
        if found is not None and (found.shape != self._shape() or found.dtype != torch.float64):
            raise ValueError(f"a sum of {self.name} is {found.dtype} {tuple(found.shape)}, not float64 {self._shape()}")
        if self._sum is not None:
            raise ValueError(f"the statistic of {self.name} has seen {self._tokens} tokens: load into a new one")
        self._tokens = state.number("tokens")
        self._sum = None if found is None else found.clone()

    def without(self, part: Self) -> Self:
        """What is left of this one without what `part`, which was merged into it, has seen."""
        left = type(self)(self.name, self.d_in)
        if self._sum is not None and part._sum is not None:
            left._sum = self._sum - part._sum.to(self._sum.device)
        left._tokens = self._tokens - part._tokens
        return left

    @abstractmethod
    def _shape(self) -> tuple[int, ...]:
        """Of the sum."""

    @abstractmethod
    def _rows_at_once(self) -> int:
        """Rows of a chunk."""

    @abstractmethod
    def _share(self, rows: Tensor) -> Tensor:
        """What a chunk of rows `(t, I)` adds to the sum, a new float64 tensor."""

    def _total(self) -> Tensor:
        """The sum in float64. Raises NumericalError if no row was seen."""
        if self._sum is None or self._tokens == 0:
            raise NumericalError(
                f"no calibration token reached {self.name}; add it to `ignore`, or calibrate on other text"
            )
        return self._sum

    def _checked(self, h: Tensor) -> Tensor:
        """The second moment h `(I,)` as float32. Raises NumericalError where a channel is not finite."""
        mean = h.to(torch.float32)
        broken = int((~mean.isfinite()).sum())
        if broken:
            raise NumericalError(
                f"the inputs of {self.name} are not finite or overflow float32 in {broken} of {self.d_in} channels, "
                f"over {self._tokens} calibration tokens; check the model's weights, or set a wider `compute_dtype`"
            )
        return mean


class InputSecondMoment(_InputMean):
    """h_i = (1/T) Σ_t x_ti², the mean over the T input rows of each squared input channel.

    Accumulated in float64, so that neither the number of rows nor their grouping into batches shows in float32.
    """

    def _shape(self) -> tuple[int, ...]:
        return (self.d_in,)

    def _rows_at_once(self) -> int:
        return max(1, _CHUNK // self.d_in)

    def _share(self, rows: Tensor) -> Tensor:
        return torch.cat([_sum_of_squares(part) for part in rows.split(_column_blocks(rows), dim=1)])

    @property
    def value(self) -> Tensor:
        """The second moment h `(I,)`, float32. Raises NumericalError if no row was seen or a channel is not finite."""
        return self._checked(self._total() / self._tokens)


class InputSize(_InputMean):
    """a_i = (1/T) Σ_t |x_ti|, the mean over the T input rows of each input channel's size, accumulated in float64."""

    def _shape(self) -> tuple[int, ...]:
        return (self.d_in,)

    def _rows_at_once(self) -> int:
        return max(1, _CHUNK // self.d_in)

    def _share(self, rows: Tensor) -> Tensor:
        return torch.cat(
            [part.to(torch.float64, copy=True).abs_().sum(0) for part in rows.split(_column_blocks(rows), dim=1)]
        )

    @property
    def value(self) -> Tensor:
        """The mean size a `(I,)`, float32. Raises NumericalError if no row was seen or a channel is not finite."""
        return self._checked(self._total() / self._tokens)


class InputGram(_InputMean):
    """H = XᵀX / T, the mean over the T input rows of the products of each two input channels.

    Products are float32 over at most 2048 rows of one call of `update`, and summed in float64. Rows are not kept back to
    fill a chunk: the same calls give the same bits, another grouping into batches differs by float32 rounding.
    """

    @property
    def enough_tokens(self) -> int:
        """One for each channel."""
        return max(ENOUGH_TOKENS, self.d_in)

    def _shape(self) -> tuple[int, ...]:
        return (self.d_in, self.d_in)

    def _rows_at_once(self) -> int:
        return _GRAM_ROWS

    def _share(self, rows: Tensor) -> Tensor:
        x = rows.to(torch.float32)
        return (x.T @ x).to(torch.float64)

    @property
    def value(self) -> Tensor:
        """H `(I, I)`, float32 and exactly symmetric. Raises NumericalError if no row was seen or a channel is not finite."""
        total, tokens = self._total(), self._tokens
        self._checked(total.diagonal() / tokens)  # |H_ij| ≤ √(H_ii H_jj): no other entry is the first to overflow
        found = torch.empty_like(total, dtype=torch.float32)
        for start in range(0, self.d_in, _READ_ROWS):
            rows = slice(start, start + _READ_ROWS)
            found[rows] = (total[rows] / tokens + total[:, rows].T / tokens) / 2
        return found

    @property
    def diagonal(self) -> Tensor:
        """The second moment h `(I,)`, float32. Raises as `value` does."""
        return self._checked(self._total().diagonal() / self._tokens)


class CrossGram(_InputMean):
    """Mean of x x̂ᵀ over pairs of rows, fed through `update_pair`."""

    def __init__(self, name: str, d_in: int) -> None:
        super().__init__(name, 2 * d_in)

    def update_pair(self, x: Tensor, dense: Tensor) -> None:
        """Take the compressed model's inputs and the dense model's, `(..., I)` each."""
        self.update(torch.cat((x, dense.to(x.dtype)), dim=-1))

    def _shape(self) -> tuple[int, ...]:
        return (self.d_in // 2, self.d_in // 2)

    def _rows_at_once(self) -> int:
        return _GRAM_ROWS

    def _share(self, rows: Tensor) -> Tensor:
        x, dense = rows.to(torch.float32).chunk(2, dim=-1)
        return (dense.T @ x).to(torch.float64)

    @property
    def value(self) -> Tensor:
        """C `(I, I)`, float32."""
        return (self._total() / self._tokens).to(torch.float32)


def _column_blocks(rows: Tensor) -> list[int]:
    """Widths of the blocks of columns of `(t, I)` that become float64 at once, all I of them on a GPU.

    The sum of a column depends on the order of its rows alone, and so not on these; on a GPU also on how many columns there are.
    """
    count, d_in = rows.shape
    width = max(_COLUMNS, _BLOCK // max(count, 1) // _COLUMNS * _COLUMNS)
    blocks = max(1, d_in // width) if rows.device.type == "cpu" else 1
    return [*[width] * (blocks - 1), d_in - width * (blocks - 1)]


def _sum_of_squares(rows: Tensor) -> Tensor:
    """`Σ_t x_ti²` of rows `(t, c)`, float64 `(c,)`."""
    return rows.to(torch.float64, copy=True).square_().sum(0)
