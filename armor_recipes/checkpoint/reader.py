"""Read a checkpoint folder without a model: for `armor inspect`, for verification, and to check it before loading."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from armor_recipes.checkpoint.config import TENSOR_NAMES, VALUES, PackedShapes, layer_block_sizes
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import CheckpointError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    file: Path
    dtype: str
    """In safetensors' spelling: `BF16`, `F32`, `U8`…"""
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class LayerSize:
    """One ARMOR layer of a checkpoint."""

    name: str
    shape: tuple[int, int]
    """`(O, I)`."""
    block_size: tuple[int, int]
    """`(b_o, b_i)`."""
    core: str
    """dtype of the kept values: `bfloat16`, `float16` or `float32`."""
    nbytes: int
    """Of values, bitmask and both factors; without the bias, which a dense layer has too."""
    dense_nbytes: int
    """Of a dense weight in the same dtype."""

    @property
    def ratio(self) -> float:
        """Bytes as a fraction of the dense bytes."""
        return self.nbytes / self.dense_nbytes


@dataclass(frozen=True, slots=True)
class CheckpointSize:
    """All ARMOR layers of a checkpoint, in the order of their names, and everything else in bytes."""

    layers: tuple[LayerSize, ...]
    other_nbytes: int
    """Of all tensors that are not part of an ARMOR layer, biases included."""

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return self.other_nbytes + sum(layer.nbytes for layer in self.layers)

    @property
    def dense_nbytes(self) -> int:
        """What all tensors would take with every ARMOR layer dense in the same dtype."""
        return self.other_nbytes + sum(layer.dense_nbytes for layer in self.layers)

    @property
    def ratio(self) -> float:
        """Bytes as a fraction of the dense bytes, over the whole checkpoint."""
        return self.nbytes / self.dense_nbytes


def read_layers(folder: Path) -> dict[str, PackedLinear]:
    """Read and check (`PackedLinear.validate`) every ARMOR layer of a checkpoint, by full module name, sorted.

    Raises:
        CheckpointError: naming the file and the tensor, if the folder is not an ARMOR checkpoint or is damaged.
    """
    tensors = read_header(folder)
    layers = {}
    for name in _checked_layers(folder, tensors):
        packed = PackedLinear(*(_read(tensors, f"{name}.{part}") for part in TENSOR_NAMES))
        packed.validate(name=f"{tensors[f'{name}.{VALUES}'].file}: {name}")
        layers[name] = packed
    return layers


def inspect(folder: Path) -> CheckpointSize:
    """Measure an ARMOR checkpoint, from its headers alone. Raises `CheckpointError` as `read_layers` does."""
    tensors = read_header(folder)
    layers = tuple(_layer_size(name, tensors, size) for name, size in _checked_layers(folder, tensors).items())
    total = sum(info.nbytes for info in tensors.values())
    return CheckpointSize(layers, total - sum(layer.nbytes for layer in layers))


def check_folder(folder: Path) -> None:
    """Check config.json against the headers of the tensor files; reads no tensor. A plain dense model passes, too.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    tensors = read_header(folder)
    if "quantization_config" in read_config(folder):
        _checked_layers(folder, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises `CheckpointError` if it is missing or no JSON object."""
    return _read_json(folder / CONFIG_FILE)


def read_header(folder: Path) -> dict[str, TensorInfo]:
    """Map tensor name → what its file's header says, over all shards, sorted.

    Raises:
        CheckpointError: if a file is missing, truncated or no safetensors, or the index and the shards differ.
    """
    index_file = folder / INDEX_FILE
    if not index_file.exists():
        return dict(sorted(_file_header(folder / WEIGHTS_FILE).items()))
    weight_map = _read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index_file}: weight_map is no mapping of tensor names to files")
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file:
            raise CheckpointError(f"{index_file}: {file!r} is no file of this folder")
        tensors.update(_file_header(folder / file))
    _check_same_names(set(weight_map), set(tensors), index_file)
    return dict(sorted(tensors.items()))


def _file_header(file: Path) -> dict[str, TensorInfo]:
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: the checkpoint is incomplete, copy or download it again")
    try:
        with safe_open(str(file), framework="pt") as tensors:
            slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 - no mapping
            return {name: _info(file, part.get_dtype(), tuple(part.get_shape())) for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): it is truncated or damaged, copy it again") from error


def _info(file: Path, dtype: str, shape: tuple[int, ...]) -> TensorInfo:
    bits = int("".join(char for char in dtype.partition("_")[0] if char.isdigit()) or 8)  # BOOL is a byte
    return TensorInfo(file, dtype, shape, prod(shape) * bits // 8)


def _read(tensors: Mapping[str, TensorInfo], name: str) -> Tensor:
    with safe_open(str(tensors[name].file), framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _checked_layers(folder: Path, tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, int]]:
    """Map layer name → block size, sorted; checks that exactly these layers' tensors are there, in the right shapes."""
    where = str(folder / CONFIG_FILE)
    sizes = layer_block_sizes(read_config(folder).get("quantization_config"), where=where)
    for name, block_size in sizes.items():
        _check_layer(name, block_size, tensors, where=where)
    for tensor, info in tensors.items():
        name, _, part = tensor.rpartition(".")
        if part in TENSOR_NAMES and part != VALUES and name not in sizes:
            raise CheckpointError(f"{info.file}: {tensor} belongs to no layer that {where} names: the two do not match")
    return dict(sorted(sizes.items()))


def _check_layer(name: str, block_size: tuple[int, int], tensors: Mapping[str, TensorInfo], *, where: str) -> None:
    infos = []
    for part in TENSOR_NAMES:
        info = tensors.get(f"{name}.{part}")
        if info is None:
            raise CheckpointError(f"{where} names the layer {name}, but no file holds its tensor {name}.{part}")
        infos.append(info)
    values, bitmask = infos[0], infos[1]
    if len(values.shape) != 2:
        raise CheckpointError(f"{values.file}: {name}.{VALUES} has shape {values.shape}; packed values are (O, I/2)")
    shapes = PackedShapes.of((values.shape[0], 2 * values.shape[1]), block_size, name=f"{where}: {name}")
    expected = (shapes.values, shapes.bitmask, shapes.a, shapes.b)
    for part, info, shape in zip(TENSOR_NAMES, infos, expected, strict=True):
        dtype = "U8" if info is bitmask else values.dtype
        if info.shape != shape or info.dtype != dtype or dtype not in _DTYPES:
            raise CheckpointError(
                f"{info.file}: {name}.{part} is {info.shape} {info.dtype}; with block size {list(block_size)} and "
                f"values {values.shape} {values.dtype} it must be {shape} "
                f"{dtype if dtype in _DTYPES else 'BF16, F16 or F32'}"
            )


def _layer_size(name: str, tensors: Mapping[str, TensorInfo], block_size: tuple[int, int]) -> LayerSize:
    values = tensors[f"{name}.{VALUES}"]
    nbytes = sum(tensors[f"{name}.{part}"].nbytes for part in TENSOR_NAMES)
    shape = values.shape[0], 2 * values.shape[1]
    core = str(_DTYPES[values.dtype]).removeprefix("torch.")
    return LayerSize(name, shape, block_size, core, nbytes, 2 * values.nbytes)


def _check_same_names(listed: set[str], held: set[str], index_file: Path) -> None:
    if listed != held:
        name = min(listed ^ held)
        what = "is listed, but no shard holds it" if name in listed else "is in a shard, but not listed"
        raise CheckpointError(f"{index_file}: tensor {name} {what}: the files do not belong together")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{file} is missing: {file.parent} is not a complete checkpoint") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds no JSON object")
    return content
