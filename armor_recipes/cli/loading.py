"""Imports of torch and transformers: without the garbage collector looking through what they make, and with huge pages."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """For a command's imports: nothing is collected meanwhile, and what they made is not looked through again before the end.

    Hundreds of thousands of functions and classes that live to the end: a quarter of the time until a plan is shown. torch reads
    once, as it allocates first, whether it asks the system for huge pages. Two fifths of the time of solves of 4,096 channels
    was the system's, which gave and took matrices page by page; with huge pages they take 0.7 of that time.
    """
    if "transformers" in sys.modules:
        yield
        return
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.register(gc.unfreeze)  # extensions complain of what is not taken down with the interpreter
        gc.enable()
        if "torch" in sys.modules:
            from armor_recipes.compute.memory import keep_small

            keep_small()
