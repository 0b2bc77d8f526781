"""Whether a tensor is still what something was prepared from."""

from __future__ import annotations

import torch
from torch import Tensor


class TensorState:
    """One tensor in one state: equal to another only if it is the same tensor, and neither changed in place nor given other memory.

    Assigning to `.data` gives it other memory, and counts as no change in place; what was prepared may hold the old address.
    """

    __slots__ = ("place", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.version, self.place = _version(tensor), _place(tensor)

    def holds(self) -> bool:
        """Whether nothing has happened to the tensor since."""
        return self == TensorState(self.tensor)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TensorState) or self.tensor is not other.tensor or self.version != other.version:
            return False
        return self.place == other.place or 0 in (self.place, other.place)

    __hash__ = None  # type: ignore[assignment]


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _place(tensor: Tensor) -> int:
    """Its address; 0, which is any, while a graph is traced, which cannot ask for it."""
    return 0 if torch.compiler.is_compiling() else tensor.data_ptr()
