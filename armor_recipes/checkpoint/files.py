"""The files of a checkpoint folder: config.json, the headers of all shards, one tensor at a time."""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from armor_recipes.checkpoint.header import TensorInfo, file_header, read_json, shown
from armor_recipes.errors import CheckpointError

CONFIG_FILE = "config.json"
MANIFEST_FILE = "armor_manifest.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
#: What is read as bytes; safetensors reads the rest.
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}
_DIMENSIONS = (
    "hidden_size",
    "intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json. Raises `CheckpointError` if it is missing or no JSON object."""
    return read_json(folder / CONFIG_FILE)


def config_dtype(folder: Path, config: Mapping[str, Any]) -> torch.dtype:
    """That of the weights that no quantisation takes, bfloat16 where none is named. Raises CheckpointError."""
    named = config.get("dtype") or "bfloat16"
    found = getattr(torch, named, None) if isinstance(named, str) else None
    if not isinstance(found, torch.dtype):
        raise CheckpointError(f"{folder / CONFIG_FILE}: dtype is {named!r:.80}, which torch does not have; correct it")
    return found


def write_whole(file: Path, content: bytes) -> None:
    """Write a file, or leave what is there: an error on the way, a full disk say, leaves no part of it."""
    beside = file.with_name(f".{file.name}")
    try:
        beside.write_bytes(content)
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def save_tensors(tensors: Mapping[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that whoever may read other new files may read. Raises what safetensors raises."""
    save_file(dict(tensors), file, metadata)
    give_usual_permissions(file)


def give_usual_permissions(file: Path) -> None:
    """Give a file what the system gives new ones beside it: safetensors (from 0.8) leaves its own to their owner alone (0600)."""
    beside = file.with_name(f".{file.name}.new")
    try:
        beside.touch()
        file.chmod(stat.S_IMODE(beside.stat().st_mode))
    finally:
        beside.unlink(missing_ok=True)


def read_header(folder: Path) -> dict[str, TensorInfo]:
    """Map tensor name → what its file's header says, over all shards, sorted.

    Raises:
        CheckpointError: if a file is missing, truncated or no safetensors (see `file_header`), or the index and the shards differ.
    """
    single = folder / WEIGHTS_FILE
    if single.exists() or not (folder / INDEX_FILE).exists():  # as transformers, which takes the single file first
        return dict(sorted(file_header(single).items()))
    return _indexed(folder)


def check_index(folder: Path) -> None:
    """Refuse an index beside the single file that names other files: one loader would take these, another those.

    Raises:
        CheckpointError: as `read_header` does, and where the two do not agree.
    """
    single = folder / WEIGHTS_FILE
    if not ((folder / INDEX_FILE).exists() and single.exists()):
        return
    if any(info.file != single for info in _indexed(folder).values()):
        raise CheckpointError(
            f"{folder} holds {WEIGHTS_FILE} and an index of other files, and loaders differ in which they take: remove one"
        )


def _indexed(folder: Path) -> dict[str, TensorInfo]:
    """`read_header` by the index."""
    index_file = folder / INDEX_FILE
    weight_map = read_json(index_file).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index_file}: weight_map is no mapping of tensor names to files")
    tensors: dict[str, TensorInfo] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or "\0" in file:
            raise CheckpointError(f"{index_file}: {shown(file)} is no file of this folder")
        for name, info in file_header(folder / file).items():
            if weight_map.get(name) != file:
                raise CheckpointError(
                    f"{index_file}: tensor {shown(name)} is in {file}, but listed in {shown(weight_map.get(name))}: the files do "
                    "not belong together"
                )
            tensors[name] = info
    missing = sorted(weight_map.keys() - tensors.keys())
    if missing:
        raise CheckpointError(
            f"{index_file}: tensor {shown(missing[0])} is listed, but no shard holds it: the files do not belong together"
        )
    return dict(sorted(tensors.items()))


def read_tensor(tensors: Mapping[str, TensorInfo], name: str) -> Tensor:
    """Read one tensor that a header names, into memory of its own. Raises `CheckpointError` where it cannot be read."""
    info = tensors[name]
    file = info.file
    try:
        if info.dtype in _DTYPES:
            held = torch.empty(info.nbytes, dtype=torch.uint8, device="cpu")
            _fill(held.numpy().data, info)
            return held.view(_DTYPES[info.dtype]).reshape(info.shape)
        with safe_open(str(file), framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: tensor {shown(name)} cannot be read ({error}): copy the file again") from error
    return tensor


def _fill(place: memoryview, info: TensorInfo) -> None:
    """Read a tensor's bytes: a mapping of the file, as safetensors makes, counts against a limit of memory as a whole."""
    with info.file.open("rb", buffering=0) as stream:
        stream.seek(info.begin)
        while len(place):
            count = stream.readinto(place)
            if not count:
                raise OSError(f"it ends {len(place)} bytes early")
            place = place[count:]


def check_whole(name: str, parts: Sequence[str], tensors: Mapping[str, TensorInfo]) -> None:
    """Check that all parts of a packed layer are there beside the first, and no dense weight is. Raises `CheckpointError`."""
    for part in parts[1:]:
        if f"{name}.{part}" not in tensors:
            raise CheckpointError(f"{tensors[f'{name}.{parts[0]}'].file}: no file holds the tensor {name}.{part}")
    if f"{name}.weight" in tensors:
        raise CheckpointError(f"{tensors[f'{name}.weight'].file}: {name} is stored both compressed and dense")


def check_sizes(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse a config.json whose model could not be these tensors by far, before somebody builds a model of that size.

    The limits are generous: layers may share their weights, and a field may mean something else in some architecture.

    Raises:
        CheckpointError: naming the field.
    """
    nbytes = sum(info.nbytes for info in tensors.values())
    limits = {"num_hidden_layers": 1024 + 16 * len(tensors), **dict.fromkeys(_DIMENSIONS, 2**20 + 8 * nbytes)}
    sections = {"": config, **{f"{key}.": value for key, value in config.items() if isinstance(value, Mapping)}}
    for prefix, section in sections.items():
        for key, limit in limits.items():
            value = section.get(key)
            if isinstance(value, int | float) and not value <= limit:
                raise CheckpointError(
                    f"{folder / CONFIG_FILE}: {prefix}{key} is {shown(value)}, and the files hold {len(tensors)} tensors of "
                    f"{nbytes} bytes: they do not belong together"
                )
