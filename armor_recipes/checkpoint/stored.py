"""What tensors a model's folder holds, by name: from safetensors headers, or from PyTorch files without reading their numbers."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armor_recipes.checkpoint.files import INDEX_FILE, WEIGHTS_FILE, read_header, read_tensor
from armor_recipes.checkpoint.header import TensorInfo
from armor_recipes.errors import InputError

BIN_FILE, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a file: its dtype (None for one that is no ordinary float), shape and bytes."""

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    nbytes: int


class StoredTensors:
    """The tensors of a folder by name, whichever files transformers would take; read one by one.

    Raises:
        CheckpointError: where safetensors files are damaged, as `read_header` does.
        InputError: where PyTorch files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._headers: Mapping[str, TensorInfo] = {}
        self._pickled: Mapping[str, Path] = {}
        if (folder / WEIGHTS_FILE).exists() or (folder / INDEX_FILE).exists():
            self._headers = read_header(folder)
            self.tensors = {n: StoredTensor(_DTYPES.get(i.dtype), i.shape, i.nbytes) for n, i in self._headers.items()}
        else:
            self._pickled, self.tensors = _pickled(folder)

    def read(self, name: str) -> Tensor:
        """One tensor, as it is in the file."""
        if name in self._headers:
            return read_tensor(self._headers, name)
        tensor: Tensor = _load_bin(self._pickled[name], "cpu")[name]
        return tensor.clone()

    @property
    def is_safetensors(self) -> bool:
        """Whether they are in safetensors files."""
        return bool(self._headers)

    @property
    def dtype(self) -> torch.dtype | None:
        """The float dtype of most numbers; None where there are none."""
        counts: Counter[torch.dtype] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype is not None:
                counts[tensor.dtype] += prod(tensor.shape)
        return next((dtype for dtype, _ in counts.most_common()), None)


def is_all_there(folder: Path) -> bool:
    """Whether every file of weights that an index names is in the folder: the hub's cache may hold some of them yet."""
    for index, single in ((INDEX_FILE, WEIGHTS_FILE), (BIN_INDEX, BIN_FILE)):
        if (folder / index).exists() and not (folder / single).exists():
            try:
                names = json.loads((folder / index).read_bytes())["weight_map"].values()
                return all((folder / name).exists() for name in set(names))
            except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
                return True  # which reading it tells
    return True


def _pickled(folder: Path) -> tuple[dict[str, Path], dict[str, StoredTensor]]:
    places: dict[str, Path] = {}
    tensors: dict[str, StoredTensor] = {}
    for file in _bin_files(folder):
        for name, tensor in _load_bin(file, "meta").items():
            if isinstance(tensor, Tensor):
                dtype = tensor.dtype if tensor.dtype in _DTYPES.values() else None
                places[name], tensors[name] = file, StoredTensor(dtype, tuple(tensor.shape), tensor.nbytes)
    return places, tensors


def _bin_files(folder: Path) -> list[Path]:
    if (folder / BIN_FILE).exists():
        return [folder / BIN_FILE]
    index = folder / BIN_INDEX
    if not index.exists():
        return []
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / name for name in sorted(names) if Path(name).name == name]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{index} is no index of PyTorch files ({error}): copy the folder again") from error


def _load_bin(file: Path, device: str) -> Mapping[str, Any]:
    """The tensors of a PyTorch file; nothing else that a pickle can hold is made, and none of its code is run."""
    try:
        try:
            found = torch.load(file, map_location=device, weights_only=True, mmap=True)
        except RuntimeError:  # a file of torch before 1.6 cannot be mapped
            found = torch.load(file, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{file} cannot be read as a file of tensors ({reason}): use a model in safetensors files"
        ) from error
    return found if isinstance(found, Mapping) else {}
