"""Keeps other libraries' progress bars and advice out of ours; their warnings of substance are errors in our own terms."""

from __future__ import annotations


def quiet_libraries() -> None:
    """Switch off the progress bars of transformers and datasets, and transformers' informational logging."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
