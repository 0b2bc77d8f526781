"""A 2:4 core as kept values and a bitmask; with float values byte for byte as compressed-tensors ≤ 0.14 wrote them.

For a core S `(O, I)` with exactly 2 kept entries in every 4 consecutive ones of a row:

- values `(O, I/2)`: the kept entries of each row, left to right;
- bitmask `(O, I/8)` uint8: one bit a column, little-endian within the byte (bit 0 of byte 0 is column 0), as
  `numpy.packbits(mask, axis=-1, bitorder="little")` writes it. The mask is the truth: a kept value may be 0.

A quantised core has integers (or 8-bit floats) for its kept values, and a scale for each group of so many kept values of a row:

- int8: values `(O, I/2)` int8, from -128 to 127 (what we make ends at -127);
- int4: values `(O, I/16)` int32, eight to a number as compressed-tensors' `pack_to_int32` packs them: kept value 8k + j of a
  row, plus 8, is in bits 4j to 4j + 3 of number k;
- fp8: values `(O, I/2)` float8_e4m3fn, a scale for each row;
- scale `(O, groups)` in the dtype of the factors, positive.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, Self

import torch
from torch import Tensor

from armor_recipes.errors import CheckpointError
from armor_recipes.solver.blockdiag import fold
from armor_recipes.solver.result import QuantizedValues, SparseFactors

PACKABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTEGER_DTYPES = {torch.int8: "int8", torch.int32: "int4"}
"""Of the stored values of a core of integers, and its core type."""
QUANTIZED_DTYPES = {**INTEGER_DTYPES, torch.float8_e4m3fn: "fp8"}
"""The same of every quantised core."""
KEPT_PER_VALUE = {"float": 1, "int8": 1, "int4": 8, "fp8": 1}
"""Kept entries of S in one stored number, by core type."""
GROUP_STEP = 8
"""A group of kept values that have one scale is a multiple of this: the int4 values of one int32."""
_ALIGNMENT = 64


class FactorizationLike(Protocol):
    """What packing needs of a solver's result: A `(J, b_o, b_o)`, S and mask `(O, I)`, B `(K, b_i, b_i)`."""

    @property
    def a(self) -> Tensor:
        """A `(J, b_o, b_o)`."""
        ...

    @property
    def core(self) -> Tensor:
        """S `(O, I)`."""
        ...

    @property
    def mask(self) -> Tensor:
        """Which entries of S are kept, `(O, I)` bool."""
        ...

    @property
    def b(self) -> Tensor:
        """B `(K, b_i, b_i)`."""
        ...


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """One ARMOR layer as it is stored: the packed core and the two block-diagonal factors.

    All floats have one dtype; where the core is quantised, its values are integers.
    """

    values: Tensor
    """The kept entries of S: floats or int8 `(O, I/2)`, or int4 eight to an int32 `(O, I/16)`."""
    bitmask: Tensor
    """`(O, I/8)` uint8, which entries those are."""
    a: Tensor
    """`(O/b_o, b_o, b_o)`, the output factor."""
    b: Tensor
    """`(I/b_i, b_i, b_i)`, the input factor."""
    scale: Tensor | None = None
    """`(O, groups)`, what the integers of a quantised core are multiplied by; None where the values are floats."""
    activations: str | None = None
    """What Bx is rounded to as the layer runs, with one scale a token: `int8` or `fp8`; None, as of float cores, leaves it."""

    @classmethod
    def from_factorization(cls, factorization: FactorizationLike, dtype: torch.dtype) -> PackedLinear:
        """Round a solver's result to `dtype` and pack it. Raises `CheckpointError` where a value overflows `dtype`."""
        values, bitmask = pack_2of4(factorization.core.to(dtype), factorization.mask)
        packed = cls(values, bitmask, factorization.a.to(dtype).contiguous(), factorization.b.to(dtype).contiguous())
        packed.validate()
        return packed

    @classmethod
    def from_factors(cls, factors: SparseFactors, dtype: torch.dtype) -> PackedLinear:
        """Round factors to `dtype` and pack them, integers as integers. Raises `CheckpointError` as `from_factorization` does."""
        packed = cls.from_factorization(factors, dtype)
        found = factors.quantized
        if found is None:
            return packed
        values = found.integers.contiguous() if found.num_bits == 8 else pack_int4(found.integers)
        packed = cls(values, packed.bitmask, packed.a, packed.b, found.scale.to(dtype).contiguous(), found.activations)
        packed.validate()
        return packed

    @classmethod
    def plain(cls, values: Tensor, bitmask: Tensor) -> PackedLinear:
        """A core alone, as a layer of block size 1 whose factors are the identity: Ŵ is S, bit for bit."""
        sizes = values.shape[0], 2 * values.shape[-1]
        a, b = (values.new_ones(size, 1, 1) for size in sizes)
        return cls(values, bitmask, a, b)

    @property
    def is_plain(self) -> bool:
        """Whether both factors are exactly the identity, and the core is not quantised."""
        return self.scale is None and all(
            bool((part == torch.eye(part.shape[-1], dtype=part.dtype)).all()) for part in (self.a, self.b)
        )

    @property
    def shape(self) -> tuple[int, int]:
        """`(O, I)` of the weight that this layer stands for."""
        return self.values.shape[0], 2 * KEPT_PER_VALUE[self.core] * self.values.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Of the layer's floats."""
        return self.a.dtype

    @property
    def block_size(self) -> tuple[int, int]:
        """`(b_o, b_i)`."""
        return self.a.shape[-1], self.b.shape[-1]

    @property
    def core(self) -> str:
        """The core type as a config group names it, see `armor_recipes.checkpoint.config.CORE_TYPES`."""
        return "float" if self.scale is None else QUANTIZED_DTYPES.get(self.values.dtype, "int8")

    @property
    def group_size(self) -> int | None:
        """Kept values of a row that have one scale; None where a whole row has one, or the core is not quantised."""
        if self.scale is None or self.scale.shape[1] < 2:
            return None
        return self.shape[1] // 2 // self.scale.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors on disk."""
        tensors = (self.values, self.bitmask, self.a, self.b, self.scale)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def to(self, dtype: torch.dtype) -> Self:
        """The same layer with its floats in `dtype`; integers stay."""
        values = self.values.to(dtype) if self.scale is None else self.values
        scale = None if self.scale is None else self.scale.to(dtype)
        return type(self)(values, self.bitmask, self.a.to(dtype), self.b.to(dtype), scale, self.activations)

    def validate(self, *, name: str = "this layer") -> None:
        """Check shapes, dtypes, the 2-of-4 rule and that all numbers are finite; `name` (the module's) is for messages.

        Raises:
            CheckpointError: naming the tensor that is wrong, its value, and what it should be.
        """
        self.unpack(name=name)

    def unpack(self, *, name: str = "this layer") -> tuple[Tensor, Tensor]:
        """Unpack the core `(O, I)`, zero where nothing is kept, and its mask (bool); checked as by `validate`.

        A quantised core comes as float32: integer times scale, exact where the scales are bfloat16 or float16.
        """
        values = self.values if self.scale is None else self._integers(self.scale, name).dequantize()
        core, mask = unpack_2of4(values, self.bitmask, name=name)
        _check_factor(self.a, rows=self.shape[0], dtype=self._checked_dtype(name), name=f"{name}: armor_a")
        _check_factor(self.b, rows=self.shape[1], dtype=self.dtype, name=f"{name}: armor_b")
        return core, mask

    def factors(self, *, name: str = "this layer") -> SparseFactors:
        """A, S with its mask, and B, S's integers where it is quantised; checked as by `validate`."""
        core, mask = self.unpack(name=name)
        return SparseFactors(
            self.a, core, mask, self.b, None if self.scale is None else self._integers(self.scale, name)
        )

    def _checked_dtype(self, name: str) -> torch.dtype:
        """What dtype the factors must have: the values', or where these are integers the scale's."""
        dtype = self.values.dtype if self.scale is None else self.scale.dtype
        if dtype not in PACKABLE_DTYPES:
            raise CheckpointError(f"{name}: weight_scale is {dtype}; it must be bfloat16, float16 or float32")
        return dtype

    def _integers(self, scale: Tensor, name: str) -> QuantizedValues:
        """The integers and their scales. Raises `CheckpointError` where they are not what the format says."""
        if self.values.dtype not in QUANTIZED_DTYPES or self.values.dim() != 2:
            raise CheckpointError(
                f"{name}: weight is {tuple(self.values.shape)} {self.values.dtype}; with a weight_scale beside it, it must be "
                "(O, I/2) int8 or float8_e4m3fn, or (O, I/16) int32 that hold eight int4 each"
            )
        _check_scale(scale, self.values.shape[0], self.shape[1] // 2, name=f"{name}: weight_scale")
        if self.values.dtype == torch.int32:
            return QuantizedValues(unpack_int4(self.values), scale, 4, self.activations)
        return QuantizedValues(self.values, scale, 8, self.activations)

    def fold(self, dtype: torch.dtype, *, name: str = "this layer") -> Tensor:
        """Compute `Ŵ = A · S · B` `(O, I)`, accumulated in float32 and then rounded to `dtype`."""
        core, _ = self.unpack(name=name)
        return fold(_aligned(self.a), core, _aligned(self.b)).to(dtype)


def pack_int4(integers: Tensor) -> Tensor:
    """Pack int8 `(O, N)` from -8 to 7 into int32 `(O, N/8)`: the one at 8k + j, plus 8, in bits 4j to 4j + 3 of number k.

    Raises:
        CheckpointError: if N is no multiple of 8.
    """
    if integers.shape[1] % GROUP_STEP:
        raise CheckpointError(
            f"cannot pack {integers.shape[1]} int4 values a row: eight go into an int32, so I must be a multiple of 16"
        )
    shifts = torch.arange(0, 32, 4, dtype=torch.int64, device=integers.device)
    unsigned = ((integers.long() + 8).unflatten(1, (-1, 8)) << shifts).sum(-1)
    return torch.where(unsigned >= 1 << 31, unsigned - (1 << 32), unsigned).to(torch.int32)


def unpack_int4(values: Tensor) -> Tensor:
    """Undo `pack_int4`: int8 `(O, N)`."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=values.device)
    nibbles: Tensor = ((values.unsqueeze(-1) >> shifts) & 15).to(torch.int8) - 8
    return nibbles.flatten(1)


def pack_2of4(core: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pack core `(O, I)` under mask `(O, I)` bool into values `(O, I/2)` in the core's dtype and bitmask `(O, I/8)`.

    Entries outside the mask are dropped; kept zeros (and the sign of -0.0) are preserved.

    Raises:
        CheckpointError: if I is no multiple of 8, the shapes differ, or a group of 4 does not keep exactly 2.
    """
    if core.dim() != 2 or core.shape != mask.shape or mask.dtype != torch.bool:
        raise CheckpointError(
            f"cannot pack core {tuple(core.shape)} under mask {tuple(mask.shape)} {mask.dtype}: "
            "both must be (O, I), the mask bool"
        )
    rows, columns = core.shape
    if columns % 8 or not columns:
        raise CheckpointError(f"cannot pack a core of {columns} columns: the bitmask needs a multiple of 8")
    _check_two_of_four(mask, name="mask")
    weights = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    bitmask = (mask.view(rows, columns // 8, 8) * weights).sum(dim=-1, dtype=torch.uint8)
    return core[mask].view(rows, columns // 2), bitmask


def unpack_2of4(values: Tensor, bitmask: Tensor, *, name: str = "this layer") -> tuple[Tensor, Tensor]:
    """Undo `pack_2of4`: core `(O, I)` in the values' dtype with zeros elsewhere, and mask `(O, I)` bool.

    Differentiable in `values`. `name` is the module's, for error messages.

    Raises:
        CheckpointError: on wrong shapes or dtypes, a group of 4 without exactly 2 set bits, or non-finite values.
    """
    _check_packed_shapes(values, bitmask, name=name)
    rows, columns = values.shape[0], 2 * values.shape[1]
    shifts = torch.arange(8, dtype=torch.uint8, device=bitmask.device)
    mask = ((bitmask.unsqueeze(-1) >> shifts) & 1).view(rows, columns).bool()
    _check_two_of_four(mask, name=f"{name}: bitmask")
    _check_finite(values, name=f"{name}: weight (the packed values)")
    # masked_scatter fills the mask's True entries in row-major order, which is the order of the packed values.
    return values.new_zeros(rows, columns).masked_scatter(mask, values), mask


def _check_packed_shapes(values: Tensor, bitmask: Tensor, *, name: str) -> None:
    if values.dtype not in PACKABLE_DTYPES or values.dim() != 2 or not values.shape[1] or values.shape[1] % 4:
        raise CheckpointError(
            f"{name}: weight is {tuple(values.shape)} {values.dtype}; the packed values of a 2:4 core are (O, I/2) "
            "with I a multiple of 8, in bfloat16, float16 or float32"
        )
    expected = (values.shape[0], values.shape[1] // 4)
    if tuple(bitmask.shape) != expected or bitmask.dtype != torch.uint8:
        raise CheckpointError(
            f"{name}: bitmask is {tuple(bitmask.shape)} {bitmask.dtype}; with values {tuple(values.shape)} it must be "
            f"{expected} torch.uint8"
        )


def _check_scale(scale: Tensor, rows: int, kept: int, *, name: str) -> None:
    groups = scale.shape[1] if scale.dim() == 2 else 0
    whole = groups == 1 or (groups > 0 and kept % (groups * GROUP_STEP) == 0)
    if not whole or scale.shape[0] != rows or scale.dtype not in PACKABLE_DTYPES:
        raise CheckpointError(
            f"{name} is {tuple(scale.shape)} {scale.dtype}; with {rows} rows of {kept} kept values it must be (rows, groups), "
            f"groups of a multiple of {GROUP_STEP} values or whole rows, in bfloat16, float16 or float32"
        )
    _check_finite(scale, name=name)
    if not bool((scale > 0).all()):
        raise CheckpointError(
            f"{name}: {int((scale <= 0).sum())} of {scale.numel()} scales are not positive: it is damaged"
        )


def _check_two_of_four(mask: Tensor, *, name: str) -> None:
    counts = mask.view(mask.shape[0], -1, 4).sum(dim=-1, dtype=torch.uint8)
    wrong = (counts != 2).nonzero()
    if wrong.numel():
        row, group = (int(i) for i in wrong[0])
        raise CheckpointError(
            f"{name}: row {row}, columns {4 * group} to {4 * group + 3} keep {int(counts[row, group])} entries and 2:4 "
            f"wants exactly 2 ({len(wrong)} of {counts.numel()} groups are wrong): the tensor is damaged or not 2:4"
        )


def _check_factor(factor: Tensor, *, rows: int, dtype: torch.dtype, name: str) -> None:
    square = factor.dim() == 3 and factor.shape[1] == factor.shape[2] and factor.shape[0] * factor.shape[1] == rows
    if not square or factor.dtype != dtype:
        raise CheckpointError(
            f"{name} is {tuple(factor.shape)} {factor.dtype}; it must be ({rows}/b, b, b) {dtype} for a block size b"
        )
    _check_finite(factor, name=name)


def _check_finite(tensor: Tensor, *, name: str) -> None:
    finite = tensor.detach().isfinite()
    if not bool(finite.all()):
        raise CheckpointError(
            f"{name}: {int((~finite).sum())} of {tensor.numel()} numbers are not finite ({tensor.dtype}); the tensor "
            "is damaged, or its numbers do not fit this dtype"
        )


def _aligned(tensor: Tensor) -> Tensor:
    # A tensor mapped from a file can start at any byte, and BLAS may round differently on unaligned operands: without
    # this copy a float32 checkpoint could fold to other bits than the session's own tensors.
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor
