"""Where in a module's fused parameters the weights and biases of its linear layers lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Slice:
    """A linear layer's weight `(O, I)` or bias `(O,)` as a part of a fused parameter."""

    parameter: str
    """Name of the fused parameter, from the module."""
    index: tuple[int | slice, ...] = ()
    transposed: bool = False
    """Whether the fused parameter holds `(I, O)` there."""

    def read(self, fused: Tensor) -> Tensor:
        """The part, in the fused parameter's memory."""
        found = fused[self.index]
        return found.T if self.transposed else found

    def write(self, fused: Tensor, value: Tensor) -> None:
        """Put the part in its place."""
        fused[self.index] = value.T if self.transposed else value


@dataclass(frozen=True, slots=True)
class Layout:
    """All linear layers of one module.

    Attributes:
        fused: shape of each fused parameter, by its name from the module.
        parts: what stands for them, by name from the module (`3.up_proj.weight`), in order.
    """

    fused: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, Slice]

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the linear layers, from the module; empty for a module that is one itself."""
        return tuple(name.rpartition(".")[0] for name in self.parts if name.rpartition(".")[2] == "weight")

    def shape(self, part: str) -> tuple[int, ...]:
        """Shape of one part, from the shapes alone."""
        piece = self.parts[part]
        return shape_of(self.fused[piece.parameter], piece)


@dataclass(frozen=True, slots=True)
class Converted:
    """What a module that was given a linear form remembers of its fused one."""

    original: type[nn.Module]
    layout: Layout


def shape_of(fused: tuple[int, ...], piece: Slice) -> tuple[int, ...]:
    """Shape of a part of a tensor of shape `fused`."""
    index = (*piece.index, *(slice(None),) * (len(fused) - len(piece.index)))
    sizes = [
        len(range(*where.indices(size))) for size, where in zip(fused, index, strict=True) if isinstance(where, slice)
    ]
    return tuple(reversed(sizes)) if piece.transposed else tuple(sizes)
