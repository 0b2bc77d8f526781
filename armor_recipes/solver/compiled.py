"""The solver's compiled extension, entered through ctypes."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from typing import Any


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
