"""Read a checkpoint folder without a model: for `armor inspect`, for verification, and to check it before loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armor_recipes.checkpoint.config import (
    BITMASK,
    FORMAT,
    FORMAT_VERSION,
    INPUT_FACTOR,
    TENSOR_NAMES,
    VALUES,
    LayerSpec,
    PackedShapes,
    layer_specs,
)
from armor_recipes.checkpoint.files import CONFIG_FILE, MANIFEST_FILE, check_sizes, read_tensor
from armor_recipes.checkpoint.files import read_config as read_config
from armor_recipes.checkpoint.files import read_header as read_header
from armor_recipes.checkpoint.header import TensorInfo, read_json, shown
from armor_recipes.checkpoint.legacy import COMPRESSED, LEGACY_NAMES, is_legacy, legacy_layers, read_legacy_layer
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import CheckpointError

_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_BIAS = "bias"


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
    """Of the layer's own tensors: values, bitmask, A, and B where it is stored with this layer; without the bias, which a
    dense layer has too."""
    dense_nbytes: int
    """Of a dense weight in the same dtype."""
    input_factor: str | None = None
    """Full name of the module that stores this layer's B; None where the layer does."""

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
    format: str = "armor"
    """`armor`, or `sparse-24-bitmask` for a legacy folder of plain 2:4."""

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
    """Read and check (`PackedLinear.validate`) every packed layer of a checkpoint, by full module name, sorted.

    Layers that share a B hold the same tensor. Those of a legacy folder have block size 1 and identity factors.

    Raises:
        CheckpointError: naming the file and the tensor, if the folder holds no packed layers or is damaged.
    """
    tensors = read_header(folder)
    quantization = read_config(folder).get("quantization_config")
    if is_legacy(quantization):
        return {name: read_legacy_layer(name, tensors) for name in legacy_layers(folder, quantization, tensors)}
    specs = checked_layers(folder, quantization, tensors)
    own = {name: read_layer(name, tensors) for name, spec in specs.items() if spec.input_factor is None}
    shared = {
        name: read_layer(name, tensors, own[spec.input_factor])
        for name, spec in specs.items()
        if spec.input_factor is not None
    }
    return dict(sorted({**own, **shared}.items()))


def read_layer(name: str, tensors: Mapping[str, TensorInfo], owner: PackedLinear | None = None) -> PackedLinear:
    """Read and check one ARMOR layer that `checked_layers` named; `owner` is the layer whose B it uses, if any."""
    values, bitmask, a = (read_tensor(tensors, f"{name}.{part}") for part in TENSOR_NAMES[:3])
    b = read_tensor(tensors, f"{name}.{INPUT_FACTOR}") if owner is None else owner.b
    packed = PackedLinear(values, bitmask, a, b)
    packed.validate(name=f"{tensors[f'{name}.{VALUES}'].file}: {name}")
    return packed


def inspect(folder: Path) -> CheckpointSize:
    """Measure a checkpoint with packed layers, from its headers alone. Raises `CheckpointError` as `read_layers` does."""
    tensors = read_header(folder)
    quantization = read_config(folder).get("quantization_config")
    if is_legacy(quantization):
        names = legacy_layers(folder, quantization, tensors)
        layers = tuple(_layer_size(name, tensors, LayerSpec((1, 1)), LEGACY_NAMES) for name in names)
    else:
        specs = checked_layers(folder, quantization, tensors)
        layers = tuple(_layer_size(name, tensors, spec, stored_names(spec)) for name, spec in specs.items())
    total = sum(info.nbytes for info in tensors.values())
    kind = FORMAT if is_legacy(quantization) else "armor"
    return CheckpointSize(layers, total - sum(layer.nbytes for layer in layers), kind)


def check_folder(folder: Path) -> None:
    """Check config.json against the headers of the tensor files; reads no tensor. A plain dense model passes, too.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    format_version(folder)
    tensors = read_header(folder)
    config = read_config(folder)
    check_sizes(folder, config, tensors)
    quantization = config.get("quantization_config")
    if is_legacy(quantization):
        legacy_layers(folder, quantization, tensors)
    elif "quantization_config" in config:
        checked_layers(folder, quantization, tensors)


def format_version(folder: Path) -> int | None:
    """The version that `armor_manifest.json` states; None where there is no manifest, as after `save_pretrained`.

    Raises:
        CheckpointError: for a version that this release does not know.
    """
    manifest = folder / MANIFEST_FILE
    if not manifest.exists():
        return None
    version = read_json(manifest).get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{manifest}: format_version is {shown(version)}; this release reads 1 to {FORMAT_VERSION}: use a later one"
        )
    return version


def stored_names(spec: LayerSpec) -> tuple[str, ...]:
    """The names of the tensors that an ARMOR layer stores itself, bias aside."""
    return TENSOR_NAMES if spec.input_factor is None else TENSOR_NAMES[:3]


def checked_layers(folder: Path, quantization: Any, tensors: Mapping[str, TensorInfo]) -> dict[str, LayerSpec]:
    """Map ARMOR layer → what the config says of it, sorted; checks that exactly these layers' tensors are there, in their shapes.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    where = str(folder / CONFIG_FILE)
    specs = layer_specs(quantization, where=where)
    for name, spec in specs.items():
        _check_layer(name, spec, tensors, where=where)
        if spec.input_factor is not None:
            _check_same_width(name, spec.input_factor, tensors)
    for tensor, info in tensors.items():
        name, _, part = tensor.rpartition(".")
        if name in specs and part not in (*stored_names(specs[name]), _BIAS):
            raise CheckpointError(f"{info.file}: {shown(tensor)} is no tensor of this layer, as {where} describes it")
        if name not in specs and part in TENSOR_NAMES[1:]:
            raise CheckpointError(
                f"{info.file}: {shown(tensor)} belongs to no layer that {where} names: the two do not match"
            )
    return dict(sorted(specs.items()))


def _check_layer(name: str, spec: LayerSpec, tensors: Mapping[str, TensorInfo], *, where: str) -> None:
    parts = stored_names(spec)
    for part in parts:
        if f"{name}.{part}" not in tensors:
            raise CheckpointError(f"{where} names the layer {name}, but no file holds its tensor {name}.{part}")
    values = tensors[f"{name}.{VALUES}"]
    if len(values.shape) != 2 or values.dtype not in _FLOATS:
        raise CheckpointError(
            f"{values.file}: {name}.{VALUES} is {values.shape} {values.dtype}; packed values are (O, I/2) in "
            f"{', '.join(_FLOATS)}; there is no layout for expert weights of three dimensions"
        )
    shapes = PackedShapes.of((values.shape[0], 2 * values.shape[1]), spec.block_size, name=f"{where}: {name}")
    expected = zip(TENSOR_NAMES, (shapes.values, shapes.bitmask, shapes.a, shapes.b), strict=True)
    for part, shape in [(part, shape) for part, shape in expected if part in parts]:
        _check_tensor(tensors, f"{name}.{part}", shape, "U8" if part == BITMASK else values.dtype, spec)
    bias = tensors.get(f"{name}.{_BIAS}")
    if bias is not None and bias.shape != (values.shape[0],):
        raise CheckpointError(f"{bias.file}: {name}.{_BIAS} has shape {bias.shape}; it must be ({values.shape[0]},)")


def _check_tensor(
    tensors: Mapping[str, TensorInfo], tensor: str, shape: tuple[int, ...], dtype: str, spec: LayerSpec
) -> None:
    info = tensors[tensor]
    if info.shape != shape or info.dtype != dtype:
        raise CheckpointError(
            f"{info.file}: {tensor} is {info.shape} {info.dtype}; with block size {list(spec.block_size)} and the layer's "
            f"packed values it must be {shape} {dtype}"
        )


def _check_same_width(name: str, owner: str, tensors: Mapping[str, TensorInfo]) -> None:
    info, other = (tensors.get(f"{module}.{VALUES}") for module in (name, owner))
    if info is None or other is None or info.shape[1:] != other.shape[1:] or info.dtype != other.dtype:
        raise CheckpointError(
            f"{CONFIG_FILE} lets {name} use the B of {owner}, but their packed values are "
            f"{[(part.shape, part.dtype) if part else None for part in (info, other)]}: widths and dtypes must be equal"
        )


def _layer_size(name: str, tensors: Mapping[str, TensorInfo], spec: LayerSpec, parts: tuple[str, ...]) -> LayerSize:
    values = tensors[f"{name}.{COMPRESSED if COMPRESSED in parts else VALUES}"]
    nbytes = sum(tensors[f"{name}.{part}"].nbytes for part in parts)
    shape = values.shape[0], 2 * values.shape[1]
    return LayerSize(name, shape, spec.block_size, _FLOATS[values.dtype], nbytes, 2 * values.nbytes, spec.input_factor)
