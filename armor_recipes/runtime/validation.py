"""Check packed tensors by parts, so that loading a layer takes no memory that grows with it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from armor_recipes.checkpoint.packing import GROUP_STEP, QUANTIZED_DTYPES, PackedLinear
from armor_recipes.errors import RecipeError

_PART = 1 << 20
"""Numbers checked at once."""


def check_packed(packed: PackedLinear, *, name: str = "this layer") -> None:
    """Check what `PackedLinear.validate` checks, without unpacking the core. `name` is the module's, for messages.

    Raises:
        CheckpointError: naming the tensor that is wrong, its value, and what it should be.
    """
    right = (
        packed.core != "fp8"
        and _shapes_fit(packed)
        and _two_of_four(packed.bitmask)
        and all(map(_finite, _floats(packed)))
    )
    if not right or not _integers_fit(packed):
        packed.validate(name=name)  # says what is wrong, and where


def has_numbers(packed: PackedLinear) -> bool:
    """Whether the compiled kernels have the layer's numbers: those of every core but fp8 ones and ones with 8-bit activations."""
    return packed.core != "fp8" and packed.activations is None


def check_numbers(packed: PackedLinear, name: str, backend: str) -> None:
    """Raise `RecipeError` where the kernels of `backend` do not have the layer's numbers; `name` is the module's."""
    if not has_numbers(packed):
        what = "fp8 cores" if packed.activations is None else f"8-bit activations ({packed.activations})"
        raise RecipeError(f"{name}: the backend {backend} has no {what}: choose `reference`, or `auto`, which runs it")


def _floats(packed: PackedLinear) -> tuple[Tensor, Tensor, Tensor]:
    return packed.values if packed.scale is None else packed.scale, packed.a, packed.b


def _shapes_fit(packed: PackedLinear) -> bool:
    tensors = (packed.values, packed.bitmask, *_floats(packed))
    if any(t.dim() != n for t, n in zip(tensors, (2, 2, 2, 3, 3), strict=True)):
        return False
    (rows, columns), (b_o, b_i) = packed.shape, packed.block_size
    expected = ((rows, columns // 8), (rows // b_o, b_o, b_o), (columns // b_i, b_i, b_i))
    whole = columns > 0 and columns % 8 == 0 and rows % b_o == 0 and columns % b_i == 0
    return whole and tuple(tuple(t.shape) for t in (packed.bitmask, packed.a, packed.b)) == expected


def _integers_fit(packed: PackedLinear) -> bool:
    """Whether a quantised core is as `armor_recipes.checkpoint.packing` says; every integer is in range. True of a float core."""
    if packed.scale is None:
        return True
    kept, (rows, groups) = packed.shape[1] // 2, packed.scale.shape
    dtypes = packed.values.dtype in QUANTIZED_DTYPES and packed.scale.dtype == packed.a.dtype == packed.b.dtype
    whole = groups == 1 or (groups > 0 and kept % (groups * GROUP_STEP) == 0)
    return dtypes and whole and rows == packed.shape[0] and bool((packed.scale > 0).all())


def _two_of_four(bitmask: Tensor) -> bool:
    """Whether every group of 4 bits has 2 set: counts within each half byte, by the usual sums of neighbours."""
    for part in _parts(bitmask):
        pairs = part - ((part >> 1) & 0x55)
        if not bool((((pairs & 0x33) + ((pairs >> 2) & 0x33)) == 0x22).all()):
            return False
    return True


def _finite(tensor: Tensor) -> bool:
    return all(bool(part.isfinite().all()) for part in _parts(tensor))


def _parts(tensor: Tensor) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = tensor.detach().flatten().split(_PART)
    return parts
