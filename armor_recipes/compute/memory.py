"""Memory of this process: what it holds, and what was freed and the allocator keeps."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from typing import Any

#: M_TRIM_THRESHOLD, M_MMAP_THRESHOLD and M_ARENA_MAX of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENAS = -1, -3, -8
#: What is free at the end of the heap stays there up to this.
_KEPT = 64 << 20
#: What is larger comes from the system and goes back to it at once: as much as glibc allows, and with a bound on memory.
_LARGE, _LARGE_WHERE_BOUNDED = 32 << 20, 4 << 20


def process_bytes(kind: str) -> int:
    """Of this process, by a name of /proc/self/status (RssAnon, VmData); 0 where the system does not say it (but Linux)."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{kind}:")), 0)


def give_back() -> None:
    """Let the allocator return to the system what is free. Nothing where it cannot be told to (glibc's can).

    Else the free memory of each phase, in pieces that the next one does not fit into, adds up: at the end of a distillation of
    SmolLM2-135M it was 2.5 GB, three times what was in use.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@cache
def keep_small() -> None:
    """Keep what is freed, but for large pieces, for the next ones of any size. Nothing where the allocator cannot be told to.

    For torch's allocator with huge pages (THP_MEM_ALLOC_ENABLE), which asks for aligned pieces: glibc's own way, a bound that
    grows to the size of what is freed, lets each of those go back to the system and come again, page by page. Threads share what
    is kept, four processors one arena: with one for each thread quickstart's peak was 840 MB on two cores, and is 500, in the same
    time.
    """
    _set(_LARGE)
    _option(_ARENAS, max(1, (os.cpu_count() or 1) // 4))


@cache
def give_back_large() -> None:
    """Let large pieces that are freed go back to the system at once, from here to the end of the process. Only glibc can be told.

    Else it keeps pieces of up to 32 MiB for the next ones, and what has another size does not fit into them: solves of a model of
    2,048 channels took 1.3 times what they held. Below 4 MiB that is worth the time it saves.
    """
    _set(_LARGE_WHERE_BOUNDED)


def _set(large: int) -> None:
    _option(_MMAP_THRESHOLD, large)
    _option(_TRIM_THRESHOLD, _KEPT)


def _option(name: int, value: int) -> None:
    option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if option is not None:
        option(name, value)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
