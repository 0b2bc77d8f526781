"""`ArmorLinear`: a linear layer whose parameters are the packed tensors of the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from armor_recipes.checkpoint.config import TENSOR_NAMES, PackedShapes
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import CheckpointError
from armor_recipes.runtime.backends import choose_backend


class ArmorLinear(nn.Linear):
    """`y = A (S (B x)) + bias` for x `(..., I)`, computed by a backend of `armor_recipes.runtime.backends`.

    Parameters: `weight` (packed values `(O, I/2)`), `bitmask`, `armor_a`, `armor_b`, `bias`; so `state_dict` is the
    checkpoint, whatever the backend keeps beside it. What the backend prepares (the folded weight, say) is no
    parameter: it is made at the first forward pass, and again after the parameters were moved, cast, replaced or
    changed in place. In training mode with gradients on it is made in every pass, inside autograd, so that the factors
    can be trained.

    Made from an `nn.Linear` in place (`adopt`), so that names, hooks and bias stay as they were.
    """

    bitmask: nn.Parameter
    armor_a: nn.Parameter
    armor_b: nn.Parameter
    backend: str | None
    """Name of the backend; None asks the environment variable ARMOR_BACKEND, then takes `folded`."""
    label: str
    """The module's full name where known, for error messages."""
    _loaded: bool
    _prepared: tuple[object, Tensor] | None

    @classmethod
    def adopt(cls, linear: nn.Linear, block_size: tuple[int, int]) -> ArmorLinear:
        """Turn `linear` into an `ArmorLinear` in place, with empty packed tensors (on the same device, meta as a rule).

        Raises:
            CheckpointError: if the block size does not divide the weight, or its columns are no multiple of 8.
        """
        shapes = PackedShapes.of((linear.out_features, linear.in_features), block_size)
        weight = linear.weight.detach()
        empty = PackedLinear(
            weight.new_empty(shapes.values),
            weight.new_empty(shapes.bitmask, dtype=torch.uint8),
            weight.new_empty(shapes.a),
            weight.new_empty(shapes.b),
        )
        layer = cls.from_packed(linear, empty)
        layer._loaded = False
        return layer

    @classmethod
    def from_packed(cls, linear: nn.Linear, packed: PackedLinear) -> ArmorLinear:
        """Turn `linear` into an `ArmorLinear` in place that holds `packed`; the bias stays."""
        linear.__class__ = cls
        assert isinstance(linear, cls)
        for name, tensor in zip(TENSOR_NAMES, (packed.values, packed.bitmask, packed.a, packed.b), strict=True):
            setattr(linear, name, nn.Parameter(tensor, requires_grad=False))
        linear.backend, linear.label, linear._loaded, linear._prepared = None, "", True, None
        return linear

    def to_dense(self) -> nn.Linear:
        """Turn this layer in place into a plain `nn.Linear` that holds the folded weight; the packed tensors go."""
        weight = self.packed().fold(self.weight.dtype, name=self._name())
        for name in TENSOR_NAMES:
            delattr(self, name)
        for name in ("backend", "label", "_loaded", "_prepared"):
            del self.__dict__[name]
        dense: nn.Linear = self
        dense.__class__ = nn.Linear
        dense.weight = nn.Parameter(weight.detach(), requires_grad=False)
        return dense

    def packed(self) -> PackedLinear:
        """Return the packed tensors, as they are now (not copied)."""
        return PackedLinear(self.weight, self.bitmask, self.armor_a, self.armor_b)

    def prepare(self) -> None:
        """Do now what the first forward pass would do: check the tensors and let the backend prepare what it runs from.

        Raises:
            CheckpointError: if a tensor was not in the checkpoint, or breaks the format.
        """
        self._check_loaded()
        self._cached()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        """Compute `(..., O)` from `input` `(..., I)`."""
        self._check_loaded()
        backend = choose_backend(self.backend)
        packed = self.packed()
        training = self.training and torch.is_grad_enabled()
        prepared = backend.prepare(packed, self._name()) if training else self._cached()
        return backend.run(input, prepared, packed, self.bias)

    def extra_repr(self) -> str:
        """Tell shape, block size and backend, for `print(model)`."""
        block_size = self.packed().block_size
        return f"{super().extra_repr()}, {block_size=}, backend={choose_backend(self.backend).name}"

    @torch.no_grad()
    def _cached(self) -> Tensor:
        backend = choose_backend(self.backend)
        key = backend.name, tuple(_Version(getattr(self, name)) for name in TENSOR_NAMES)
        if self._prepared is None or self._prepared[0] != key:
            self._prepared = None  # the old one is freed before the new one is made
            self._prepared = key, backend.prepare(self.packed(), self._name())
        return self._prepared[1]

    def _check_loaded(self) -> None:
        """Refuse a layer that transformers filled in part: of tensors that it does not find it only logs the names.

        It marks what it loaded; where some are marked and some are not, the others hold whatever was in memory.
        """
        if self._loaded:
            return
        marks = {name: hasattr(getattr(self, name), "_is_hf_initialized") for name in TENSOR_NAMES}
        missing = [name for name, mark in marks.items() if not mark]
        if missing and any(marks.values()):
            raise CheckpointError(
                f"{self._name()}: the checkpoint holds no {', '.join(missing)} for this layer: it is damaged"
            )
        self._loaded = True

    def _name(self) -> str:
        return self.label or f"an ARMOR layer of shape ({self.out_features}, {self.in_features})"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(), .half(), .cuda(): the prepared tensor follows from the packed ones, so it is made again, not moved.
        self._prepared = None
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out of copies and pickles what can be prepared again."""
        return {**self.__dict__, "_prepared": None}


class _Version:
    """One tensor in one state: equal to another only if it is the same tensor and was not changed in place since."""

    __slots__ = ("count", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.count = 0 if tensor.is_inference() else tensor._version

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Version) and self.tensor is other.tensor and self.count == other.count

    __hash__ = None  # type: ignore[assignment]
