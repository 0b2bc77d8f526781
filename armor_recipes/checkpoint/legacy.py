"""Folders that compressed-tensors ≤ 0.14 wrote: plain 2:4, and 2:4 with integers (`armor_recipes.checkpoint.marlin`).

Plain 2:4 has a `sparsity_config` with `format: sparse-24-bitmask`, and no quantisation.

For a linear layer P with weight `(O, I)`:

| tensor | dtype | shape | content |
|---|---|---|---|
| `P.compressed` | float | `(O, I/2)` | as `P.weight` of an ARMOR layer |
| `P.bitmask` | uint8 | `(O, I/8)` | as `P.bitmask` of an ARMOR layer |
| `P.shape` | int64 | `(2, 1)` | O and I |

Such a layer is read as an ARMOR layer of block size 1 whose factors are the identity.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from armor_recipes.checkpoint.config import FORMAT, QUANT_METHOD, LayerSpec
from armor_recipes.checkpoint.files import CONFIG_FILE, check_whole, read_tensor
from armor_recipes.checkpoint.header import TensorInfo, shown
from armor_recipes.checkpoint.marlin import MARLIN, MARLIN_NAMES, is_marlin, marlin_layers, read_marlin_layer
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import CheckpointError

LEGACY_NAMES = COMPRESSED, BITMASK, SHAPE = "compressed", "bitmask", "shape"
WRITTEN_BY = "0.14.0.1"
"""The compressed-tensors whose bytes these are, and the last one that reads them."""
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True, slots=True)
class LegacyLayer:
    """What is read of one layer."""

    shape: tuple[int, int]
    """`(O, I)`."""
    spec: LayerSpec
    dtype: str
    """Of its floats, as a header names it."""


@dataclass(frozen=True, slots=True)
class LegacyFolder:
    """A folder of one of the two kinds, its config and headers checked."""

    format: str
    """`sparse-24-bitmask` or `marlin-24`."""
    parts: tuple[str, ...]
    """The names of a layer's tensors after the module's; the first are its values."""
    layers: Mapping[str, LegacyLayer]
    """By full module name, sorted."""
    tensors: Mapping[str, TensorInfo]
    _read: Callable[[str, Mapping[str, TensorInfo]], PackedLinear]

    def read(self, name: str) -> PackedLinear:
        """Read and check one layer. Raises `CheckpointError` naming file and tensor."""
        return self._read(name, self.tensors)


def is_legacy(quantization: object) -> TypeGuard[Mapping[str, Any]]:
    """Whether a `quantization_config` is of these kinds, or of a relative of them that `open_legacy` refuses."""
    return isinstance(quantization, Mapping) and (bool(quantization.get("sparsity_config")) or is_marlin(quantization))


def open_legacy(folder: Path, quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> LegacyFolder:
    """Check config and headers of a folder of which `is_legacy` says that it is one; reads no tensor.

    Raises:
        CheckpointError: naming file and tensor, for other formats, and where the tensors of a layer do not fit each other.
    """
    if is_marlin(quantization):
        found = marlin_layers(quantization, tensors, where=str(folder / CONFIG_FILE))
        integers = {name: LegacyLayer(shape, spec, "F16") for name, (shape, spec) in found.items()}
        return LegacyFolder(MARLIN, MARLIN_NAMES, integers, tensors, read_marlin_layer)
    layers = {}
    for name in _plain_layers(folder, quantization, tensors):
        values = tensors[f"{name}.{COMPRESSED}"]
        layers[name] = LegacyLayer((values.shape[0], 2 * values.shape[1]), LayerSpec((1, 1)), values.dtype)
    return LegacyFolder(FORMAT, LEGACY_NAMES, layers, tensors, _read_plain_layer)


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


def _plain_layers(folder: Path, quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> list[str]:
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


def _read_plain_layer(name: str, tensors: Mapping[str, TensorInfo]) -> PackedLinear:
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
    if quantization.get("config_groups"):
        raise CheckpointError(
            f"{where}: 2:4 together with quantisation in the format {shown(quantization.get('format'))} is not read, only "
            f"{MARLIN} is. Decompress it with compressed-tensors <= 0.14 first"
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
    check_whole(name, LEGACY_NAMES, tensors)
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
