"""Weights in memory of large pages, which a processor finds its way in sooner."""

from __future__ import annotations

import mmap
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

#: Bytes of a large page on x86-64 and, with pages of 4 KiB, on ARM. What is smaller would gain nothing.
LARGE_PAGE = 2 << 20


def to_large_pages(tensors: Iterable[Tensor]) -> None:
    """Move the data of each tensor on the CPU that is a page and more into memory for which large pages are asked.

    A token reads every weight once, and in pages of 4 KiB it waits for their addresses, too. Nothing is moved where the system
    cannot be asked (but Linux). Tensors that share a storage no longer do.
    """
    advice = getattr(mmap, "MADV_HUGEPAGE", None)
    for tensor in tensors:
        if advice is None or not tensor.is_cpu or not tensor.is_contiguous() or tensor.nbytes < LARGE_PAGE:
            continue
        with torch.inference_mode(False):
            tensor.data = _copied(tensor.detach(), advice)


def _copied(tensor: Tensor, advice: int) -> Tensor:
    place: Any = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    place.madvise(advice)
    made = torch.frombuffer(place, dtype=tensor.dtype).view(tensor.shape)
    return made.copy_(tensor)


def read_each_token(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> list[Tensor]:
    """Parameters of the model's layers of these kinds, each once."""
    layers = (module for module in model.modules() if isinstance(module, kinds))
    found = {id(tensor): tensor for layer in layers for tensor in layer.parameters(recurse=False)}
    return list(found.values())
