"""Check packed tensors by parts, so that loading a layer takes no memory that grows with it."""

from __future__ import annotations

from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear

_PART = 1 << 20
"""Numbers checked at once."""


def check_packed(packed: PackedLinear, *, name: str = "this layer") -> None:
    """Check what `PackedLinear.validate` checks, without unpacking the core. `name` is the module's, for messages.

    Raises:
        CheckpointError: naming the tensor that is wrong, its value, and what it should be.
    """
    fits = _shapes_fit(packed) and _two_of_four(packed.bitmask) and all(map(_finite, _floats(packed)))
    if packed.scale is not None or not fits:  # integers and scales are checked in full
        packed.validate(name=name)  # says what is wrong, and where


def _floats(packed: PackedLinear) -> tuple[Tensor, Tensor, Tensor]:
    return packed.values, packed.a, packed.b


def _shapes_fit(packed: PackedLinear) -> bool:
    if any(t.dim() != n for t, n in zip((*_floats(packed), packed.bitmask), (2, 3, 3, 2), strict=True)):
        return False
    (rows, columns), (b_o, b_i) = packed.shape, packed.block_size
    expected = ((rows, columns // 2), (rows // b_o, b_o, b_o), (columns // b_i, b_i, b_i))
    whole = columns % 8 == 0 and rows % b_o == 0 and columns % b_i == 0
    shapes = [tuple(t.shape) for t in _floats(packed)]
    return whole and shapes == list(expected) and tuple(packed.bitmask.shape) == (rows, columns // 8)


def _two_of_four(bitmask: Tensor) -> bool:
    """Whether every group of 4 bits has 2 set: counts within each half byte, by the usual sums of neighbours."""
    for part in bitmask.detach().flatten().split(_PART):
        pairs = part - ((part >> 1) & 0x55)
        if not bool((((pairs & 0x33) + ((pairs >> 2) & 0x33)) == 0x22).all()):
            return False
    return True


def _finite(tensor: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in tensor.detach().flatten().split(_PART))
