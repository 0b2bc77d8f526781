"""Imports of torch and transformers, without the garbage collector looking through what they make, again and again."""

from __future__ import annotations

import atexit
import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """For a command's imports: nothing is collected meanwhile, and what they made is not looked through again before the end.

    Hundreds of thousands of functions and classes that live to the end: a quarter of the time until a plan is shown.
    """
    if "transformers" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # extensions complain of what is not taken down with the interpreter
        gc.enable()
