"""Memory that was freed and that the allocator keeps."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from typing import Any

#: Of glibc's malloc.h.
_M_MMAP_THRESHOLD = -3


def give_back() -> None:
    """Let the allocator return to the system what is free. Nothing where it cannot be told to (glibc's can).

    Else the free memory of each phase, in pieces that the next one does not fit into, adds up: at the end of a distillation of
    SmolLM2-135M it was 2.5 GB, three times what was in use.
    """
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def apart(nbytes: int) -> None:
    """Let the allocator map each piece of so many bytes by itself, from here on: what is freed is no part of the process then, and
    holes among other pieces count against a limit. Nothing where it cannot be told to.
    """
    tell = _of_libc("mallopt")
    if tell is not None:
        tell(_M_MMAP_THRESHOLD, nbytes)


@cache
def _of_libc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if os.name == "posix" else None
