"""Statistics of a module's inputs, accumulated batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

from armor_recipes.errors import NumericalError

#: Values converted to float64 at once (32 MB), so that a large batch does not need several times its memory.
_CHUNK = 1 << 22
#: Rows summed in float32 by one product of `InputGram`: its rounding error, about 1e-6, does not grow with the number of tokens.
_GRAM_ROWS = 2048
#: `SplitGram` keeps one window of so many apart, or so many groups of datasets.
_HELD_OUT_EVERY = 4
#: Its parts where windows are told apart by their number; those of datasets are numbered from 0.
_THE_OTHERS, _EVERY_FOURTH = -2, -1


class _InputMean(ABC):
    """A mean over a module's input rows, accumulated in float64 on the device of the inputs.

    Nothing waits for the device before a value is read.
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

    def add(self, other: Self) -> None:
        """Take all that another one has seen of the same module."""
        if other._sum is not None:
            self._sum = other._sum.clone() if self._sum is None else self._sum.add_(other._sum.to(self._sum.device))
        self._tokens += other._tokens

    def without(self, part: Self) -> Self:
        """What is left of this one without what `part`, which was added to it, has seen."""
        left = type(self)(self.name, self.d_in)
        if self._sum is not None and part._sum is not None:
            left._sum = self._sum - part._sum.to(self._sum.device)
        left._tokens = self._tokens - part._tokens
        return left

    @abstractmethod
    def _rows_at_once(self) -> int:
        """Rows of a chunk."""

    @abstractmethod
    def _share(self, rows: Tensor) -> Tensor:
        """What a chunk of rows `(t, I)` adds to the sum, a new float64 tensor."""

    def _mean(self) -> Tensor:
        """The mean in float64. Raises NumericalError if no row was seen."""
        if self._sum is None or self._tokens == 0:
            raise NumericalError(
                f"no calibration token reached {self.name}; add it to `ignore`, or calibrate on other text"
            )
        return self._sum / self._tokens

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

    def _rows_at_once(self) -> int:
        return max(1, _CHUNK // self.d_in)

    def _share(self, rows: Tensor) -> Tensor:
        return rows.to(torch.float64).square().sum(0)

    @property
    def value(self) -> Tensor:
        """The second moment h `(I,)`, float32. Raises NumericalError if no row was seen or a channel is not finite."""
        return self._checked(self._mean())


class SplitGram:
    """H of a module's inputs in parts, to choose a regularisation on tokens that took no part in it.

    Windows of several datasets are parted by those (in four groups at most), since text of another kind is what a model meets; else
    every fourth window is kept apart. Fed with pairs (`propagate: matched`) it also keeps what the dense model's module reads on
    the same tokens: C = XX̂ᵀ/n, and XXᵀ/n.

    Attributes:
        shrinkage: room for what was chosen on the splits, so that it is chosen once; None again with the next `update`.
    """

    def __init__(self, name: str, d_in: int) -> None:
        self.name = name
        self.d_in = d_in
        self.shrinkage: float | None = None
        self._origins: Sequence[int] = ()
        self._parts: dict[int, InputGram] = {}
        self._pairs, self._dense = _CrossGram(name, d_in), InputGram(name, d_in)
        self._windows = 0

    def expect(self, origins: Sequence[int]) -> None:
        """The number of its dataset for each window to come, in order; they come again from the first after the last."""
        self._origins = origins if len(set(origins)) > 1 else ()

    @property
    def tokens(self) -> int:
        """Input rows seen so far."""
        return sum(part.tokens for part in self._parts.values())

    def update(self, x: Tensor, dense: Tensor | None = None) -> None:
        """Take inputs `(B, L, I)`, a window an entry of B, or rows `(..., I)` as one window; and the dense model's beside them."""
        self.shrinkage = None
        for window in x if x.ndim == 3 else x[None]:
            part = self._part_of_next(whole_window=x.ndim == 3)
            self._parts.setdefault(part, InputGram(self.name, self.d_in)).update(window)
            self._windows += 1
        if dense is not None:
            self._pairs.update_pair(x, dense)
            self._dense.update(dense)

    def _part_of_next(self, *, whole_window: bool) -> int:
        if whole_window and self._origins:
            return self._origins[self._windows % len(self._origins)] % _HELD_OUT_EVERY
        return _EVERY_FOURTH if self._windows % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1 else _THE_OTHERS

    def splits(self) -> list[tuple[Tensor, Tensor]]:
        """H of some windows and H of those held out for them, `(I, I)` each: every dataset in turn, or every fourth window once.

        Empty where there is nothing to hold out.
        """
        if len(self._parts) < 2:
            return []
        total = self._all()
        held = [part for key, part in sorted(self._parts.items()) if key != _THE_OTHERS]
        return [(total.without(part).value, part.value) for part in held]

    def _all(self) -> InputGram:
        total = InputGram(self.name, self.d_in)
        for _, part in sorted(self._parts.items()):
            total.add(part)
        return total

    @property
    def value(self) -> Tensor:
        """H `(I, I)` of all tokens, float32, exactly symmetric. Raises NumericalError as `InputGram.value` does."""
        return self._all().value

    @property
    def diagonal(self) -> Tensor:
        """The second moment h `(I,)`, float32."""
        return self.value.diagonal().contiguous()

    @property
    def cross(self) -> Tensor:
        """C = XX̂ᵀ/n `(I, I)`, float32. Raises NumericalError where no pairs were seen."""
        return self._pairs.value

    @property
    def dense(self) -> Tensor:
        """XXᵀ/n `(I, I)` of the dense model's inputs, float32."""
        return self._dense.value


class InputGram(_InputMean):
    """H = XᵀX / T, the mean over the T input rows of the products of each two input channels.

    Products are float32 over at most 2048 rows of one call of `update`, and summed in float64. Rows are not kept back to
    fill a chunk: the same calls give the same bits, another grouping into batches differs by float32 rounding.
    """

    def _rows_at_once(self) -> int:
        return _GRAM_ROWS

    def _share(self, rows: Tensor) -> Tensor:
        x = rows.to(torch.float32)
        return (x.T @ x).to(torch.float64)

    @property
    def value(self) -> Tensor:
        """H `(I, I)`, float32 and exactly symmetric. Raises NumericalError if no row was seen or a channel is not finite."""
        mean = self._mean()
        self._checked(mean.diagonal())  # |H_ij| ≤ √(H_ii H_jj): no other entry is the first to overflow
        return ((mean + mean.T) / 2).to(torch.float32)

    @property
    def diagonal(self) -> Tensor:
        """The second moment h `(I,)`, float32. Raises as `value` does."""
        return self._checked(self._mean().diagonal())


class _CrossGram(_InputMean):
    """Mean of x x̂ᵀ over pairs of rows, fed through `update_pair`."""

    def update_pair(self, x: Tensor, dense: Tensor) -> None:
        """Take the compressed model's inputs and the dense model's, `(..., I)` each."""
        self.update(torch.cat((x, dense.to(x.dtype)), dim=-1))

    def __init__(self, name: str, d_in: int) -> None:
        super().__init__(name, 2 * d_in)

    def _rows_at_once(self) -> int:
        return _GRAM_ROWS

    def _share(self, rows: Tensor) -> Tensor:
        x, dense = rows.to(torch.float32).chunk(2, dim=-1)
        return (dense.T @ x).to(torch.float64)

    @property
    def value(self) -> Tensor:
        """C `(I, I)`, float32."""
        return self._mean().to(torch.float32)
