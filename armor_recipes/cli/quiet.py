"""Keeps other libraries' progress bars and advice out of ours; their warnings of substance are errors in our own terms."""

from __future__ import annotations

import functools
from typing import Any


def quiet_libraries() -> None:
    """Switch off all bars drawn with tqdm in this process, and transformers' informational logging."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    _disable_bars()


@functools.cache
def _disable_bars() -> None:
    """Make every bar a disabled one. TQDM_DISABLE=1 sets a default only, and compressed-tensors says `disable=False`."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    build = tqdm.__init__

    def build_disabled(self: Any, *args: Any, **options: Any) -> None:
        build(self, *args, **{**options, "disable": True})

    tqdm.__init__ = build_disabled
