"""2:4 with int4 or int8 weights as compressed-tensors ≤ 0.14 wrote it for the Marlin kernel, `format: marlin-24`; read only.

For a linear layer P with weight `(O, I)`, O a multiple of 64 and I of 32:

| tensor | dtype | shape | content |
|---|---|---|---|
| `P.weight_packed` | int32 | `(I/32, 2·O)`, with int8 `(I/32, 4·O)` | kept integers plus 8 or 128, eight or four to a number |
| `P.scale_packed` | fp16 | `(G, O)` | one scale for each 128 columns of a row, or `(1, O)` for the whole row |
| `P.meta` | int16 | `(I/32, 2·O)` | which two of each four are kept: two indices of two bits a group, four groups to a number |

Their entries lie in the order in which the kernel's threads and the sparse tensor cores take them. Each order is a permutation
of the bits of an entry's place, written out below as a view with one axis for each bit or run of bits.

Such a layer is read as an ARMOR layer of block size 1 with identity factors and an int4 or int8 core: the same integers and scales.
compressed-tensors itself never could undo this packing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from armor_recipes.checkpoint.config import QUANT_METHOD, LayerSpec
from armor_recipes.checkpoint.files import check_whole, read_tensor
from armor_recipes.checkpoint.header import TensorInfo, shown
from armor_recipes.checkpoint.packing import PackedLinear, pack_int4
from armor_recipes.errors import CheckpointError

MARLIN = "marlin-24"
MARLIN_NAMES = INTEGERS, SCALES, META = "weight_packed", "scale_packed", "meta"
GROUP = 128
"""Columns of a row that have one scale: half as many kept values."""
_TILE = 16  # rows and columns of the transposed kept values that lie together
_ROW_STEP, _COLUMN_STEP = 64, 32


def is_marlin(quantization: Mapping[str, Any]) -> bool:
    """Whether a `quantization_config` is of this format."""
    groups = quantization.get("config_groups")
    every = groups.values() if isinstance(groups, Mapping) else ()
    return MARLIN in (quantization.get("format"), *(g.get("format") for g in every if isinstance(g, Mapping)))


def marlin_layers(
    quantization: Mapping[str, Any], tensors: Mapping[str, TensorInfo], *, where: str
) -> dict[str, tuple[tuple[int, int], LayerSpec]]:
    """Map full name of each layer → `(O, I)` and what it is read as, sorted; checks config and headers.

    Raises:
        CheckpointError: naming file and tensor, for what no release wrote, and where the tensors of a layer do not fit each other.
    """
    bits = _check_config(quantization, where=where)
    names = sorted(name.removesuffix(f".{INTEGERS}") for name in tensors if name.endswith(f".{INTEGERS}"))
    if not names:
        raise CheckpointError(f"{where} promises {MARLIN}, but no file holds a tensor P.{INTEGERS}")
    found = {name: _layer(name, tensors) for name in names}
    for name, (_, spec) in found.items():
        if int(spec.core.removeprefix("int")) not in bits:
            raise CheckpointError(f"{where} promises {sorted(bits)} bits, but {name} is stored with {spec.core}")
    for tensor, info in tensors.items():
        name, _, part = tensor.rpartition(".")
        if part in (SCALES, META) and name not in found:
            raise CheckpointError(f"{info.file}: {shown(tensor)} has no {INTEGERS} beside it")
    return found


def read_marlin_layer(name: str, tensors: Mapping[str, TensorInfo]) -> PackedLinear:
    """Read and check one layer that `marlin_layers` named. Raises `CheckpointError` naming file and tensor."""
    _, spec = _layer(name, tensors)
    parts = (read_tensor(tensors, f"{name}.{part}").contiguous() for part in MARLIN_NAMES)
    where = f"{tensors[f'{name}.{INTEGERS}'].file}: {name}"
    packed = unpack_marlin(*parts, spec=spec, name=where)
    packed.validate(name=where)
    return packed


def unpack_marlin(
    integers: Tensor, scales: Tensor, meta: Tensor, *, spec: LayerSpec, name: str = "this layer"
) -> PackedLinear:
    """The layer that three tensors, in the shapes that the module's docstring gives, stand for; `name` is for messages.

    Raises:
        CheckpointError: where the indices of a group are not two, in ascending order.
    """
    values = _values(integers, 4 if spec.core == "int4" else 8)
    rows, kept = values.shape
    scale = _scale(scales, columns=2 * kept)
    a, b = (scale.new_ones(size, 1, 1) for size in (rows, 2 * kept))
    return PackedLinear(pack_int4(values) if spec.core == "int4" else values, _bitmask(meta, name=name), a, b, scale)


def _values(integers: Tensor, bits: int) -> Tensor:
    """The kept integers `(O, I/2)` int8 of `P.weight_packed`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    unsigned = (integers.unsqueeze(-1) >> shifts) & ((1 << bits) - 1)
    signed = (unsigned - (1 << (bits - 1))).to(torch.int8)
    tiles = signed.shape[0]
    # A thread's 8 values are those of kept rows 2q, 2q + 1 (low), 8 + 2q, 9 + 2q (high) of a tile, in two halves of 4 columns.
    thread = ("low", "block", "high") if bits == 4 else ("block", "low", "high")
    stored = ("tiles", "strips", "tile", "half", "q", "j", *thread)
    sizes = {"tiles": tiles, "strips": -1, "tile": 4, "half": 2, "q": 4, "j": 4, "low": 2, "block": 2, "high": 2}
    wanted = ("strips", "tile", "half", "block", "j", "tiles", "high", "q", "low")
    rows = signed.view([sizes[axis] for axis in stored]).permute([stored.index(axis) for axis in wanted])
    return rows.reshape(-1, tiles * _TILE)


def _bitmask(meta: Tensor, *, name: str) -> Tensor:
    """`(O, I/8)` uint8 of `P.meta`."""
    pairs = meta.shape[0]  # of numbers of a row, each for 16 columns
    stored = ("pairs", "strips", "row2", "row8", "row1", "number", "row4")
    sizes = {"pairs": pairs, "strips": -1, "row2": 2, "row8": 8, "row1": 2, "number": 2, "row4": 2}
    wanted = ("strips", "row8", "row4", "row2", "row1", "pairs", "number")
    rows = meta.view([sizes[axis] for axis in stored]).permute([stored.index(axis) for axis in wanted])
    indices = (rows.reshape(-1, 2 * pairs, 1).int() >> torch.arange(0, 16, 2, dtype=torch.int32)) & 3
    first, second = (part.flatten(1) for part in (indices[..., 0::2], indices[..., 1::2]))
    wrong = (first >= second).nonzero()
    if len(wrong):
        row, group = wrong[0].tolist()
        raise CheckpointError(
            f"{name}.{META}: row {row}, columns {4 * group} to {4 * group + 3} keep entries {int(first[row, group])} and "
            f"{int(second[row, group])}; the first must come before the second ({len(wrong)} groups are wrong): it is damaged"
        )
    one = torch.tensor(1, dtype=torch.int32)
    nibbles = one << first | one << second
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).to(torch.uint8)


def _scale(scales: Tensor, *, columns: int) -> Tensor:
    """`(O, G)` of `P.scale_packed`. The packer counts kept columns: where these fit into one group it permutes nothing."""
    if len(scales) > 1 and columns > 2 * GROUP:
        scales = scales.view(len(scales), -1, 4, 2).transpose(2, 3).reshape(scales.shape)
    return scales.T.contiguous()


def _layer(name: str, tensors: Mapping[str, TensorInfo]) -> tuple[tuple[int, int], LayerSpec]:
    """`(O, I)` and core of a layer, from its shapes alone."""
    check_whole(name, MARLIN_NAMES, tensors)
    integers, scales, meta = (tensors[f"{name}.{part}"] for part in MARLIN_NAMES)
    if len(meta.shape) != 2 or not min(meta.shape) or meta.shape[1] % (2 * _ROW_STEP) or meta.dtype != "I16":
        raise CheckpointError(
            f"{meta.file}: {name}.{META} is {meta.shape} {meta.dtype}; it must be (I/{_COLUMN_STEP}, 2 O) I16, O a multiple of "
            f"{_ROW_STEP}"
        )
    rows, columns = meta.shape[1] // 2, _COLUMN_STEP * meta.shape[0]
    core = {2 * rows: "int4", 4 * rows: "int8"}.get(integers.shape[-1] if integers.shape else 0)
    if core is None or integers.shape[:-1] != (columns // 32,) or integers.dtype != "I32":
        raise CheckpointError(
            f"{integers.file}: {name}.{INTEGERS} is {integers.shape} {integers.dtype}; with {META} {meta.shape} it must be "
            f"{(columns // 32, 2 * rows)} I32, or with int8 {(columns // 32, 4 * rows)}"
        )
    groups = {1, columns // GROUP if columns % GROUP == 0 else 1}
    if scales.dtype != "F16" or scales.shape not in [(count, rows) for count in groups]:
        raise CheckpointError(
            f"{scales.file}: {name}.{SCALES} is {scales.shape} {scales.dtype}; for a weight {(rows, columns)} it must be "
            f"{' or '.join(str((count, rows)) for count in sorted(groups))} F16"
        )
    return (rows, columns), LayerSpec((1, 1), core, None, GROUP // 2 if scales.shape[0] > 1 else None)


def _check_config(quantization: Mapping[str, Any], *, where: str) -> set[int]:
    """The numbers of bits that the groups promise."""
    if quantization.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(f"{where}: {MARLIN} with quant_method {shown(quantization.get('quant_method'))}")
    groups = quantization.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(f"{where}: quantization_config.config_groups is {shown(groups)}; it must name a group")
    if quantization.get("transform_config"):
        raise CheckpointError(f"{where}: transform_config is not empty; transforms are not read")
    return {
        _check_group(group, where=f"{where}: quantization_config.config_groups.{key}") for key, group in groups.items()
    }


def _check_group(group: object, *, where: str) -> int:
    weights = group.get("weights") if isinstance(group, Mapping) else None
    if not isinstance(group, Mapping) or not isinstance(weights, Mapping):
        raise CheckpointError(f"{where} is {shown(group)}; it must describe weights")
    if group.get("format") not in (None, MARLIN) or group.get("input_activations"):
        raise CheckpointError(
            f"{where} has format {shown(group.get('format'))}, input_activations {shown(group.get('input_activations'))}; with "
            f"{MARLIN} only weights are quantised, and all of them in this format"
        )
    bits, strategy, size = (weights.get(key) for key in ("num_bits", "strategy", "group_size"))
    fits = (strategy, size) in (("channel", None), ("channel", -1), ("group", GROUP))
    plain = weights.get("type", "int") == "int" and weights.get("symmetric") is True
    if type(bits) is not int or bits not in (4, 8) or not fits or not plain or weights.get("actorder") == "group":
        raise CheckpointError(
            f"{where}: weights are {shown(dict(weights))}; {MARLIN} holds symmetric integers of 4 or 8 bits, one scale a channel "
            f"or a group of {GROUP}, without actorder: group"
        )
    return bits
