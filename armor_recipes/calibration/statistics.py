"""Statistics of a module's inputs, accumulated batch by batch."""

from __future__ import annotations

import torch
from torch import Tensor

from armor_recipes.errors import NumericalError

#: Values converted to float64 at once (32 MB), so that a large batch does not need several times its memory.
_CHUNK = 1 << 22


class InputSecondMoment:
    """h_i = (1/T) Σ_t x_ti², the mean over the T input rows of each squared input channel.

    Accumulated in float64, so that neither the number of rows nor their grouping into batches shows in float32. The sum
    stays on the device of the inputs, and nothing waits for it before `value` is read.
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
        if self._sum is None:
            self._sum = torch.zeros(self.d_in, dtype=torch.float64, device=x.device)
        for chunk in torch.split(rows, max(1, _CHUNK // self.d_in)):
            self._sum += chunk.to(torch.float64).square().sum(0).to(self._sum.device)
        self._tokens += rows.shape[0]

    @property
    def value(self) -> Tensor:
        """The second moment h `(I,)`, float32. Raises NumericalError if no row was seen or a channel is not finite."""
        if self._sum is None or self._tokens == 0:
            raise NumericalError(
                f"no calibration token reached {self.name}; add it to `ignore`, or calibrate on other text"
            )
        mean = (self._sum / self._tokens).to(torch.float32)
        broken = int((~mean.isfinite()).sum())
        if broken:
            raise NumericalError(
                f"the inputs of {self.name} are not finite or overflow float32 in {broken} of {self.d_in} channels, "
                f"over {self._tokens} calibration tokens; check the model's weights, or set a wider `compute_dtype`"
            )
        return mean
