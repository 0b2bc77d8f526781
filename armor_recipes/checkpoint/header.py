"""Headers of safetensors files and JSON files, checked before anything relies on them; nothing else of a file is read.

safetensors checks much of this when it opens a file. It keeps the last of two equal names, though, and what is known here of a
file bounds what a reader allocates: a tensor is never larger than its bytes on disk.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from reprlib import Repr
from typing import Any

from armor_recipes.errors import CheckpointError

MAX_HEADER_BYTES = 32 * 2**20
"""Of one file's header: about 250 000 tensors. Parsed, it takes about ten times as much memory."""
MAX_JSON_BYTES = 64 * 2**20
"""Of config.json, the index or the manifest."""
_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 8
_MAX_INTEGER = 2**63 - 1
_SHORT = Repr()
_SHORT.maxstring, _SHORT.maxlevel = 200, 2
shown = _SHORT.repr
"""repr() of what a file holds, for messages: short, and no deeper than a message needs."""
_BITS = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    "F4": 4,
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a safetensors header says of one tensor."""

    file: Path
    dtype: str
    """In safetensors' spelling: `BF16`, `F32`, `U8`…"""
    shape: tuple[int, ...]
    nbytes: int
    begin: int
    """First byte, from the beginning of the file."""


def file_header(file: Path) -> dict[str, TensorInfo]:
    """Map tensor name → what the header of this file says, in the order of the bytes.

    Raises:
        CheckpointError: naming the file, and the tensor where there is one, if the file is missing, no regular file or
            truncated; if the header is longer than the file or `MAX_HEADER_BYTES`, no JSON object, or names a tensor twice; if a
            tensor's dtype is unknown, or its shape, dtype and place do not agree; or if the tensors' places overlap, leave gaps
            or do not end with the file.
    """
    entries, data_bytes = _entries(file)
    start = file.stat().st_size - data_bytes
    placed = [(*_placed(file, name, entry, start), name) for name, entry in entries.items() if name != "__metadata__"]
    position = 0
    tensors: dict[str, TensorInfo] = {}
    for begin, end, info, name in sorted(placed, key=lambda entry: entry[:2]):
        if begin != position:
            raise CheckpointError(
                f"{file}: tensor {shown(name)} begins at byte {begin} where {position} is due: the tensors overlap or leave a gap"
            )
        tensors[name], position = info, end
    if position != data_bytes:
        raise CheckpointError(
            f"{file} cannot be read: it holds {data_bytes} bytes of tensors and its header names {position}: it is truncated or "
            "damaged, copy it again"
        )
    return tensors


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object. Raises `CheckpointError` if it is missing, too large, no JSON object, or names a key twice."""
    if not file.exists():
        raise CheckpointError(f"{file} is missing: {file.parent} is not a complete checkpoint")
    try:
        return _json_object(_content(file), str(file))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error})") from error


def _content(file: Path) -> bytes:
    if not file.is_file():  # reading a pipe would wait for its writer
        raise CheckpointError(f"{file} is no regular file")
    size = file.stat().st_size
    if size > MAX_JSON_BYTES:
        raise CheckpointError(f"{file} has {size} bytes; more than {MAX_JSON_BYTES} are not read")
    return file.read_bytes()


def _entries(file: Path) -> tuple[dict[str, Any], int]:
    """The header of a file as it stands there, and the number of bytes behind it."""
    if not file.parent.exists():
        raise CheckpointError(f"{file.parent}: no such folder; check the path")
    if not file.is_file():
        raise CheckpointError(f"{file} is missing: the checkpoint is incomplete, copy or download it again")
    try:
        with file.open("rb") as stream:
            size = file.stat().st_size
            length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
            rest = size - _LENGTH_BYTES - length
            if size < _LENGTH_BYTES or rest < 0 or length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{file} cannot be read: a header of {length} bytes in a file of {size} (at most {MAX_HEADER_BYTES} are "
                    "read): it is truncated or damaged, copy it again"
                )
            return _json_object(stream.read(length), f"{file}: the header"), rest
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}): copy it again") from error


def _json_object(text: bytes, what: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise CheckpointError(f"{what} names {shown(twice)} twice: which one is meant?")
        return found

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} holds no JSON object")
    return content


def _placed(file: Path, name: str, entry: object, start: int) -> tuple[int, int, TensorInfo]:
    """First byte, last byte + 1 and description of one tensor."""
    where = f"{file}: tensor {shown(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is {shown(entry)} in the header; it needs dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise CheckpointError(f"{where} has the unknown dtype {shown(dtype)}")
    if not _are_sizes(shape) or len(shape) > _MAX_DIMENSIONS or not _are_sizes(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has shape {shown(shape)} at {shown(offsets)}: no sizes")
    begin, end = offsets
    bits = prod(shape) * _BITS[dtype]
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"{where} is {tuple(shape)} {dtype}, {bits // 8} bytes, but takes the bytes {begin} to {end}: shape and place disagree"
        )
    return begin, end, TensorInfo(file, dtype, tuple(shape), bits // 8, start + begin)


def _are_sizes(value: object) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= _MAX_INTEGER for n in value)
