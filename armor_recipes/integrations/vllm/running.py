"""How loaded pieces of a layer run: by a backend of this package, or as the folded weight by vLLM's own method."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.integrations.vllm.parts import Piece
from armor_recipes.runtime.backends import Backend


@dataclass(frozen=True, slots=True)
class Prepared:
    """How a layer runs: each piece by a backend of this package, from what that prepared."""

    backend: Backend
    pieces: tuple[Piece, ...]
    prepared: tuple[Any, ...]

    @classmethod
    def of(cls, backend: Backend, pieces: Sequence[Piece]) -> Prepared:
        """Let the backend prepare the pieces."""
        return cls(backend, tuple(pieces), tuple(backend.prepare(piece.packed, piece.name) for piece in pieces))

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute `(..., O)` from x `(..., I)`."""
        outputs = []
        for piece, prepared in zip(self.pieces, self.prepared, strict=True):
            part = None if bias is None else bias[piece.rows]
            outputs.append(self.backend.run(x, prepared, piece.packed, part))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def folds(backend: Backend, pieces: Iterable[Piece]) -> bool:
    """Whether nothing better than the folded weight can run the pieces, which vLLM's own method then does."""
    found = list(pieces)
    on_cpu = all(piece.packed.values.device.type == "cpu" for piece in found)
    kernel = all(backend.traced(piece.packed, None) for piece in found)
    return backend.name == "folded" or (backend.name == "auto" and not (on_cpu and kernel))


@dataclass(frozen=True, slots=True)
class Plain:
    """How a dense layer runs among packed ones."""

    weight: Tensor

    def run(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Compute `(..., O)` from x `(..., I)`."""
        return nn.functional.linear(x, self.weight, bias)


def folded(pieces: Iterable[Piece]) -> Tensor:
    """The whole weight `(O, I)` of pieces below each other."""
    return torch.cat([piece.packed.fold(piece.packed.dtype, name=piece.name) for piece in pieces])
