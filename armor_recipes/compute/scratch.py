"""Tensors in mapped files: the system reads them as they are used and takes their memory back, and they are no anonymous memory."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

V = TypeVar("V")
#: Bytes below which a file is not worth its page.
_SMALL = 1 << 16


class Scratch:
    """Files of a folder, one for each tensor and without a name, which go with the tensor or with the process.

    Values and layout in memory are those of any tensor (mapped memory is aligned to a page), so nothing that is computed differs.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros, whose bytes are reserved on the disk. Raises OSError where that is full."""
        if prod(shape) * dtype.itemsize < _SMALL:
            return torch.zeros(shape, dtype=dtype, device="cpu")
        handle, name = tempfile.mkstemp(prefix=".armor-scratch-", dir=self.folder)
        try:
            os.posix_fallocate(
                handle, 0, prod(shape) * dtype.itemsize
            )  # a write to a file with holes would be a SIGBUS
            return torch.from_file(name, shared=True, size=prod(shape), dtype=dtype).view(shape)
        finally:
            os.close(handle)
            Path(name).unlink()

    def keep(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The same numbers, cast to `dtype`, in a file."""
        with torch.inference_mode(False), torch.no_grad():
            return self.empty(tuple(tensor.shape), dtype or tensor.dtype).copy_(tensor)

    def keep_all(self, value: V, kept: dict[int, Tensor] | None = None) -> V:
        """A dataclass, or a mapping, with its tensors in files; what it holds twice is kept once. Anything else as it is."""
        known = {} if kept is None else kept
        found: Any = value
        if isinstance(value, Tensor):
            if id(value) not in known:
                known[id(value)] = self.keep(value)
            found = known[id(value)]
        elif isinstance(value, Mapping):
            found = {key: self.keep_all(each, known) for key, each in value.items()}
        elif is_dataclass(value) and not isinstance(value, type):
            inside = {each.name: self.keep_all(getattr(value, each.name), known) for each in fields(value) if each.init}
            found = replace(value, **inside)
        return found  # type: ignore[no-any-return]
