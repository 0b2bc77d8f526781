"""Plain 2:4 as compressed-tensors ≤ 0.14 wrote it, `sparsity_config` with `format: sparse-24-bitmask`, and no quantisation.

For a linear layer P with weight `(O, I)`:

| tensor | dtype | shape | content |
|---|---|---|---|
| `P.compressed` | float | `(O, I/2)` | as `P.weight` of an ARMOR layer |
| `P.bitmask` | uint8 | `(O, I/8)` | as `P.bitmask` of an ARMOR layer |
| `P.shape` | int64 | `(2, 1)` | O and I |

Such a layer is read as an ARMOR layer of block size 1 whose factors are the identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from armor_recipes.checkpoint.config import FORMAT, QUANT_METHOD
from armor_recipes.checkpoint.files import CONFIG_FILE, read_tensor
from armor_recipes.checkpoint.header import TensorInfo, shown
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import CheckpointError

LEGACY_NAMES = COMPRESSED, BITMASK, SHAPE = "compressed", "bitmask", "shape"
WRITTEN_BY = "0.14.0.1"
"""The compressed-tensors whose bytes these are, and the last one that reads them."""
_FLOATS = ("BF16", "F16", "F32")


def is_legacy(quantization: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a `quantization_config` is of this kind, or of a relative of it that `legacy_layers` refuses."""
    return isinstance(quantization, Mapping) and bool(quantization.get("sparsity_config"))


def legacy_config(ignore: Sequence[str]) -> dict[str, Any]:
    """The `quantization_config` of a folder in which every linear layer but those in `ignore` is written this way."""
    return {
        "quant_method": QUANT_METHOD,
        "sparsity_config": {
            "format": FORMAT,
            "global_sparsity": 0.5,
            "ignore": sorted(ignore),
            "registry_requires_subclass": False,
            "sparsity_structure": "2:4",
            "targets": ["Linear"],
        },
        "transform_config": {},
        "version": WRITTEN_BY,
    }


def legacy_tensors(packed: PackedLinear) -> dict[str, Tensor]:
    """A layer's tensors by their names after the module's name; the factors, which must be the identity, are left out."""
    return {COMPRESSED: packed.values, BITMASK: packed.bitmask, SHAPE: torch.tensor(packed.shape).reshape(2, 1)}


def legacy_layers(folder: Path, quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> list[str]:
    """Full names of the layers, sorted; checks config and headers.

    Raises:
        CheckpointError: naming file and tensor, for other formats, and where the tensors of a layer do not fit each other.
    """
    where = str(folder / CONFIG_FILE)
    _check_config(quantization, where=where)
    names = sorted(name.removesuffix(f".{COMPRESSED}") for name in tensors if name.endswith(f".{COMPRESSED}"))
    if not names:
        raise CheckpointError(f"{where} promises {FORMAT}, but no file holds a tensor P.{COMPRESSED}")
    for name in names:
        _check_layer(name, tensors)
    for tensor, info in tensors.items():
        name, _, part = tensor.rpartition(".")
        if part in (BITMASK, SHAPE) and f"{name}.{COMPRESSED}" not in tensors:
            raise CheckpointError(f"{info.file}: {shown(tensor)} has no {COMPRESSED} values beside it")
    _check_ignored(quantization["sparsity_config"], frozenset(names), where=where)
    return names


def read_legacy_layer(name: str, tensors: Mapping[str, TensorInfo]) -> PackedLinear:
    """Read and check one layer that `legacy_layers` named. Raises `CheckpointError` naming file and tensor."""
    where = tensors[f"{name}.{COMPRESSED}"].file
    packed = PackedLinear.plain(
        *(read_tensor(tensors, f"{name}.{part}").contiguous() for part in (COMPRESSED, BITMASK))
    )
    shape = read_tensor(tensors, f"{name}.{SHAPE}").flatten().tolist()
    if shape != list(packed.shape):
        raise CheckpointError(
            f"{where}: {name}.{SHAPE} says {shape}; the {COMPRESSED} values make {list(packed.shape)}"
        )
    packed.validate(name=f"{where}: {name}")
    return packed


def _check_config(quantization: Mapping[str, Any], *, where: str) -> None:
    """Refuse everything but plain 2:4."""
    sparsity = quantization["sparsity_config"]
    if quantization.get("quant_method") != QUANT_METHOD or not isinstance(sparsity, Mapping):
        raise CheckpointError(f"{where}: sparsity_config is {shown(sparsity)}: not written by {QUANT_METHOD}")
    if quantization.get("config_groups") or "marlin-24" in (quantization.get("format"), sparsity.get("format")):
        raise CheckpointError(
            f"{where}: 2:4 together with quantisation (format {shown(quantization.get('format'))}) is not read: its "
            "permutations could not be checked. Decompress it with compressed-tensors <= 0.14 first"
        )
    if sparsity.get("format") != FORMAT or sparsity.get("sparsity_structure") != "2:4":
        raise CheckpointError(
            f"{where}: sparsity_config has format {shown(sparsity.get('format'))}, structure "
            f"{shown(sparsity.get('sparsity_structure'))}; only {FORMAT} with 2:4 is read"
        )
    if quantization.get("transform_config"):
        raise CheckpointError(f"{where}: transform_config is not empty; transforms are not read")


def _check_ignored(sparsity: Mapping[str, Any], names: frozenset[str], *, where: str) -> None:
    """`ignore` may hold patterns, which nothing here runs; names in it are held against the tensors."""
    ignore = sparsity.get("ignore") or []
    if not isinstance(ignore, list):
        raise CheckpointError(f"{where}: sparsity_config.ignore is {shown(ignore)}; it must be a list")
    wrong = sorted(names.intersection(entry for entry in ignore if isinstance(entry, str)))
    if wrong:
        raise CheckpointError(f"{where}: sparsity_config.ignore names {shown(wrong[0])}, which is stored compressed")


def _check_layer(name: str, tensors: Mapping[str, TensorInfo]) -> None:
    for part in (BITMASK, SHAPE):
        if f"{name}.{part}" not in tensors:
            raise CheckpointError(f"{tensors[f'{name}.{COMPRESSED}'].file}: no file holds the tensor {name}.{part}")
    if f"{name}.weight" in tensors:
        raise CheckpointError(f"{tensors[f'{name}.weight'].file}: {name} is stored both compressed and dense")
    values, bitmask, shape = (tensors[f"{name}.{part}"] for part in LEGACY_NAMES)
    two_of_four = len(values.shape) == 2 and min(values.shape) > 0 and values.shape[1] % 4 == 0
    if values.dtype not in _FLOATS or not two_of_four:
        raise CheckpointError(
            f"{values.file}: {name}.{COMPRESSED} is {values.shape} {values.dtype}; it must be (O, I/2), I a multiple of 8, in "
            f"{', '.join(_FLOATS)}"
        )
    expected = (bitmask, BITMASK, (values.shape[0], values.shape[1] // 4), "U8"), (shape, SHAPE, (2, 1), "I64")
    for info, part, sizes, dtype in expected:
        if info.shape != sizes or info.dtype != dtype:
            raise CheckpointError(
                f"{info.file}: {name}.{part} is {info.shape} {info.dtype}; with {COMPRESSED} values {values.shape} it must be "
                f"{sizes} {dtype}"
            )
