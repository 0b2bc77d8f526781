"""The solver's compiled extension, entered through ctypes, and blocks of S shared out among threads."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from armor_recipes.compute.threads import at_once

#: Entries of S below which starting another thread costs more than it saves.
_WORTH_A_THREAD = 1 << 16


@functools.cache
def compiled(name: str, *, pointers: int, integers: int) -> Callable[..., None] | None:
    """The function `name` of so many pointers and then int64, or None where the extension was not built (with it)."""
    spec = importlib.util.find_spec("armor_recipes.solver._native")
    if spec is None or spec.origin is None:
        return None
    function: Any = getattr(ctypes.CDLL(spec.origin), name, None)
    if function is None:
        return None
    function.restype = None
    function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * integers
    return function  # type: ignore[no-any-return]


def over_blocks(run: Callable[[int, int], None], blocks: int, entries: int) -> None:
    """Call `run(first, end)` for shares of independent blocks, in as many threads as there is work to be done at once.

    `entries` are those of all blocks: few of them are not worth a thread.
    """
    threads = max(1, min(at_once(), blocks, entries // _WORTH_A_THREAD))
    if threads == 1:
        run(0, blocks)
        return
    bounds = [blocks * i // threads for i in range(threads + 1)]
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(run, bounds[:-1], bounds[1:]))
