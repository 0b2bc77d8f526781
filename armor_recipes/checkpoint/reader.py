"""Read a checkpoint folder without a model: for `armor inspect`, for verification, and to check it before loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armor_recipes.checkpoint.config import (
    BITMASK,
    FORMAT_VERSION,
    INPUT_FACTOR,
    OUTPUT_FACTOR,
    SCALE,
    TENSOR_NAMES,
    VALUES,
    LayerSpec,
    PackedShapes,
    cache_of,
    layer_specs,
    tensor_names,
)
from armor_recipes.checkpoint.files import (
    CONFIG_FILE,
    MANIFEST_FILE,
    check_index,
    check_sizes,
    config_dtype,
    read_tensor,
)
from armor_recipes.checkpoint.files import read_config as read_config
from armor_recipes.checkpoint.files import read_header as read_header
from armor_recipes.checkpoint.header import TensorInfo, read_json, shown
from armor_recipes.checkpoint.legacy import is_legacy, open_legacy
from armor_recipes.checkpoint.packing import KEPT_PER_VALUE, PackedLinear
from armor_recipes.checkpoint.quantized import WEIGHT_PACKED, QuantizedCache, QuantizedLinear, Scheme, cache_tensors
from armor_recipes.checkpoint.targets import plain_schemes, quantized_names
from armor_recipes.errors import CheckpointError
from armor_recipes.paths import user_path

_FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
_INTEGERS = {"int8": ("I8",), "int4": ("I32",), "fp8": ("F8_E4M3",)}
_ITEMSIZES = {"BF16": 2, "F16": 2, "F32": 4}
BIAS = "bias"


@dataclass(frozen=True, slots=True)
class LayerSize:
    """One ARMOR layer of a checkpoint."""

    name: str
    shape: tuple[int, int]
    """`(O, I)`."""
    block_size: tuple[int, int]
    """`(b_o, b_i)`."""
    core: str
    """What the kept values are: `bfloat16`, `float16`, `float32`, or the integers `int8` or `int4`."""
    nbytes: int
    """Of the layer's own tensors: values, bitmask, scales, A, and B where it is stored with this layer; without the bias, which
    a dense layer has too."""
    dense_nbytes: int
    """Of a dense weight in the layer's float dtype."""
    input_factor: str | None = None
    """Full name of the module that stores this layer's B; None where the layer does."""
    group_size: int | None = None
    """Kept values of a row that have one scale; None for a whole row, and where the core is not quantised."""

    @property
    def ratio(self) -> float:
        """Bytes as a fraction of the dense bytes."""
        return self.nbytes / self.dense_nbytes


@dataclass(frozen=True, slots=True)
class PlainSize:
    """One plain quantised layer of a checkpoint: its weight's shape `(O, I)`, its scheme in words, and bytes as in `LayerSize`."""

    name: str
    shape: tuple[int, int]
    scheme: str
    nbytes: int
    dense_nbytes: int

    @property
    def ratio(self) -> float:
        """Bytes as a fraction of the dense bytes."""
        return self.nbytes / self.dense_nbytes


@dataclass(frozen=True, slots=True)
class CheckpointSize:
    """All ARMOR layers of a checkpoint, in the order of their names, all plain quantised ones, and everything else in bytes."""

    layers: tuple[LayerSize, ...]
    other_nbytes: int
    """Of all tensors that are part of neither, biases included."""
    format: str = "armor"
    """`armor`, or `sparse-24-bitmask` or `marlin-24` for a legacy folder."""
    plain: tuple[PlainSize, ...] = ()

    @property
    def nbytes(self) -> int:
        """Of all tensors."""
        return self.other_nbytes + sum(x.nbytes for x in self.layers) + sum(x.nbytes for x in self.plain)

    @property
    def dense_nbytes(self) -> int:
        """What all tensors would take with every layer dense in the same dtype."""
        return self.other_nbytes + sum(x.dense_nbytes for x in self.layers) + sum(x.dense_nbytes for x in self.plain)

    @property
    def ratio(self) -> float:
        """Bytes as a fraction of the dense bytes, over the whole checkpoint."""
        return self.nbytes / self.dense_nbytes


def read_layers(folder: Path) -> dict[str, PackedLinear]:
    """Read and check (`PackedLinear.validate`) every packed layer of a checkpoint, by full module name, sorted.

    Layers that share a B hold the same tensor. A weight that several modules share is one layer, under the name by which it is
    stored. Layers of a legacy folder have block size 1 and identity factors.

    Raises:
        CheckpointError: naming the file and the tensor, if the folder holds no packed layers or is damaged.
    """
    tensors = read_header(folder)
    quantization = read_config(folder).get("quantization_config")
    if is_legacy(quantization):
        legacy = open_legacy(folder, quantization, tensors)
        return {name: legacy.read(name) for name in legacy.layers}
    specs = checked_layers(folder, quantization, tensors)
    own = {
        name: read_layer(name, tensors, activations=spec.activations)
        for name, spec in specs.items()
        if spec.input_factor is None
    }
    shared = {
        name: read_layer(name, tensors, own[spec.input_factor], activations=spec.activations)
        for name, spec in specs.items()
        if spec.input_factor is not None
    }
    return dict(sorted({**own, **shared}.items()))


def read_layer(
    name: str,
    tensors: Mapping[str, TensorInfo],
    owner: PackedLinear | None = None,
    *,
    activations: str | None = None,
) -> PackedLinear:
    """Read and check one ARMOR layer that `checked_layers` named; `owner` is the layer whose B it uses, if any.

    `activations` is what its spec says of them.
    """
    values, bitmask, a = (read_tensor(tensors, f"{name}.{part}") for part in TENSOR_NAMES[:3])
    b = read_tensor(tensors, f"{name}.{INPUT_FACTOR}") if owner is None else owner.b
    scale = read_tensor(tensors, f"{name}.{SCALE}") if f"{name}.{SCALE}" in tensors else None
    packed = PackedLinear(values, bitmask, a, b, scale, activations)
    packed.validate(name=f"{tensors[f'{name}.{VALUES}'].file}: {name}")
    return packed


def plain_layers(folder: Path, quantization: Any, tensors: Mapping[str, TensorInfo]) -> dict[str, Scheme]:
    """Map plain quantised layer → what it is quantised to, sorted.

    Raises:
        CheckpointError: where a group names a layer in full whose tensors are not there.
    """
    where = str(folder / CONFIG_FILE)
    found = _plain_schemes(quantization, tensors, where=where)
    for name in found:
        if f"{name}.{VALUES}" not in tensors and f"{name}.{WEIGHT_PACKED}" not in tensors:
            raise CheckpointError(f"{where} quantises {shown(name)}, of which no file holds a weight")
    return dict(sorted(found.items()))


def _plain_schemes(quantization: Any, tensors: Mapping[str, TensorInfo], *, where: str) -> dict[str, Scheme]:
    armor = layer_specs(quantization, where=where)
    names = [name for name in quantized_names(tensors) if name not in armor]
    return plain_schemes(quantization, names, where=where)


def read_plain(name: str, scheme: Scheme, tensors: Mapping[str, TensorInfo]) -> QuantizedLinear:
    """Read one layer that `plain_layers` named."""
    parts = [key.removeprefix(f"{name}.") for key in tensors if key.rpartition(".")[0] == name]
    return QuantizedLinear(scheme, {part: read_tensor(tensors, f"{name}.{part}") for part in parts if part != BIAS})


def _plain_size(name: str, scheme: Scheme, tensors: Mapping[str, TensorInfo], itemsize: int) -> PlainSize:
    own = {key.rpartition(".")[2]: info for key, info in tensors.items() if key.rpartition(".")[0] == name}
    if "weight_shape" in own:
        rows, columns = (int(n) for n in read_tensor(tensors, f"{name}.weight_shape"))
    elif VALUES in own:
        rows, columns = own[VALUES].shape
    else:
        rows, packed = own[WEIGHT_PACKED].shape
        columns = packed * 8 // scheme.args.weights.num_bits
    nbytes = sum(info.nbytes for part, info in own.items() if part != BIAS)
    return PlainSize(name, (rows, columns), scheme.described, nbytes, rows * columns * itemsize)


def inspect(folder: Path) -> CheckpointSize:
    """Measure a checkpoint with packed layers, from its headers alone. Raises `CheckpointError` as `read_layers` does."""
    folder = user_path(folder)
    tensors = read_header(folder)
    config = read_config(folder)
    quantization, plain = config.get("quantization_config"), tuple[PlainSize, ...]()
    if is_legacy(quantization):
        legacy = open_legacy(folder, quantization, tensors)
        kind = legacy.format
        layers = tuple(
            _layer_size(name, tensors, layer.spec, legacy.parts, layer.shape, layer.dtype)
            for name, layer in legacy.layers.items()
        )
    else:
        kind, found = "armor", []
        for name, spec in checked_layers(folder, quantization, tensors).items():
            shape, floats = _weight_shape(tensors[f"{name}.{VALUES}"], spec), _float_dtype(name, spec, tensors)
            found.append(_layer_size(name, tensors, spec, stored_names(spec), shape, floats))
        layers = tuple(found)
        itemsize = config_dtype(folder, config).itemsize
        schemes = plain_layers(folder, quantization, tensors)
        plain = tuple(_plain_size(name, scheme, tensors, itemsize) for name, scheme in schemes.items())
    total = sum(info.nbytes for info in tensors.values())
    own = sum(layer.nbytes for layer in layers) + sum(layer.nbytes for layer in plain)
    return CheckpointSize(layers, total - own, kind, plain)


def check_folder(folder: Path) -> None:
    """Check config.json against the headers of the tensor files; reads no tensor. A plain dense model passes, too.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    format_version(folder)
    check_index(folder)
    tensors = read_header(folder)
    config = read_config(folder)
    check_sizes(folder, config, tensors)
    quantization = config.get("quantization_config")
    if is_legacy(quantization):
        open_legacy(folder, quantization, tensors)
    elif quantization is not None:
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
    if spec.tied_to is not None:
        return ()
    return tuple(part for part in tensor_names(spec.core) if part != INPUT_FACTOR or spec.input_factor is None)


def checked_layers(folder: Path, quantization: Any, tensors: Mapping[str, TensorInfo]) -> dict[str, LayerSpec]:
    """Map ARMOR layer → what the config says of it, sorted; checks that exactly these layers' tensors are there, in their shapes.

    Modules whose weight is tied to another's are not among them: they store nothing.

    Raises:
        CheckpointError: naming the file and the tensor.
    """
    where = str(folder / CONFIG_FILE)
    specs = layer_specs(quantization, where=where)
    plain = _plain_schemes(quantization, tensors, where=where)
    own = {name: spec for name, spec in specs.items() if spec.tied_to is None}
    for name, spec in own.items():
        _check_layer(name, spec, tensors, where=where)
        if spec.input_factor is not None:
            _check_same_width(name, spec.input_factor, tensors)
    for tensor, info in tensors.items():
        name, _, part = tensor.rpartition(".")
        if name in specs and part not in (*stored_names(specs[name]), BIAS):
            raise CheckpointError(f"{info.file}: {shown(tensor)} is no tensor of this layer, as {where} describes it")
        if name not in specs and name not in plain and part in (*TENSOR_NAMES[1:], SCALE):
            raise CheckpointError(
                f"{info.file}: {shown(tensor)} belongs to no layer that {where} names: the two do not match"
            )
    cached_modules(cache_of(quantization, where=where), tensors, where=where)
    return dict(sorted(own.items()))


def read_caches(folder: Path) -> dict[str, QuantizedCache]:
    """What keys and values of each attention module with scales are quantised to; empty where none are, or dynamically.

    Raises:
        CheckpointError: where a module has some of its scales and not all.
    """
    where, tensors = str(folder / CONFIG_FILE), read_header(folder)
    scheme = cache_of(read_config(folder).get("quantization_config"), where=where)
    names = cached_modules(scheme, tensors, where=where)
    parts = () if scheme is None else cache_tensors(scheme)
    return {
        name: QuantizedCache(str(scheme), {part: read_tensor(tensors, f"{name}.{part}") for part in parts})
        for name in names
    }


def cached_modules(scheme: str | None, tensors: Mapping[str, TensorInfo], *, where: str) -> tuple[str, ...]:
    """The modules with scales of keys and values, sorted; none where those are not quantised, or dynamically.

    Raises:
        CheckpointError: where a module has some of its scales and not all.
    """
    parts = () if scheme is None else cache_tensors(scheme)
    found = sorted({name.removesuffix(f".{part}") for part in parts for name in tensors if name.endswith(f".{part}")})
    for name in found:
        lacking = [part for part in parts if f"{name}.{part}" not in tensors]
        if lacking:
            raise CheckpointError(
                f"{where} has a kv_cache_scheme, and no file holds {lacking[0]} of {shown(name)}: copy the files again"
            )
    return tuple(found)


def _check_layer(name: str, spec: LayerSpec, tensors: Mapping[str, TensorInfo], *, where: str) -> None:
    parts = stored_names(spec)
    for part in parts:
        if f"{name}.{part}" not in tensors:
            raise CheckpointError(f"{where} names the layer {name}, but no file holds its tensor {name}.{part}")
    values = tensors[f"{name}.{VALUES}"]
    allowed = _INTEGERS.get(spec.core, tuple(_FLOATS))
    if len(values.shape) != 2 or values.dtype not in allowed:
        raise CheckpointError(
            f"{values.file}: {name}.{VALUES} is {values.shape} {values.dtype}; packed values of core type {spec.core} are "
            f"(O, I/{2 * KEPT_PER_VALUE[spec.core]}) in {', '.join(allowed)}; there is no layout for expert weights of three "
            "dimensions"
        )
    shapes = PackedShapes.of(_weight_shape(values, spec), spec, name=f"{where}: {name}")
    floats = _float_dtype(name, spec, tensors)
    dtypes = {VALUES: values.dtype, BITMASK: "U8"}
    names = (*TENSOR_NAMES, SCALE)
    for part, shape in zip(names, (shapes.values, shapes.bitmask, shapes.a, shapes.b, shapes.scale), strict=True):
        if part in parts and shape is not None:
            _check_tensor(tensors, f"{name}.{part}", shape, dtypes.get(part, floats), spec)
    bias = tensors.get(f"{name}.{BIAS}")
    if bias is not None and bias.shape != (values.shape[0],):
        raise CheckpointError(f"{bias.file}: {name}.{BIAS} has shape {bias.shape}; it must be ({values.shape[0]},)")


def _weight_shape(values: TensorInfo, spec: LayerSpec) -> tuple[int, int]:
    """`(O, I)`."""
    return values.shape[0], 2 * KEPT_PER_VALUE[spec.core] * values.shape[1]


def _float_dtype(name: str, spec: LayerSpec, tensors: Mapping[str, TensorInfo]) -> str:
    """What dtype the layer's floats have: the packed values' own, or where these are integers that of A."""
    info = tensors[f"{name}.{VALUES if spec.core == 'float' else OUTPUT_FACTOR}"]
    if info.dtype not in _FLOATS:
        raise CheckpointError(
            f"{info.file}: {name}.{OUTPUT_FACTOR} is {info.dtype}; it must be one of {', '.join(_FLOATS)}"
        )
    return info.dtype


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
    both = [[tensors.get(f"{module}.{part}") for part in (VALUES, OUTPUT_FACTOR)] for module in (name, owner)]
    found = [[(part.shape[1:], part.dtype) if part else None for part in parts] for parts in both]
    if found[0] != found[1]:
        raise CheckpointError(
            f"{CONFIG_FILE} lets {name} use the B of {owner}, but their packed values and A are {found}: widths and dtypes "
            "must be equal"
        )


def _layer_size(
    name: str,
    tensors: Mapping[str, TensorInfo],
    spec: LayerSpec,
    parts: tuple[str, ...],
    shape: tuple[int, int],
    floats: str,
) -> LayerSize:
    nbytes = sum(tensors[f"{name}.{part}"].nbytes for part in parts)
    dense = shape[0] * shape[1] * _ITEMSIZES[floats]
    core = spec.core if spec.core in _INTEGERS else _FLOATS[floats]
    return LayerSize(name, shape, spec.block_size, core, nbytes, dense, spec.input_factor, spec.group_size)
