"""Names of datasets, models and outputs as others may read them."""

from __future__ import annotations

from pathlib import Path


def without_folders(name: str) -> str:
    """A dataset's, model's or output's name; an absolute path or one below a home folder by its last part alone."""
    if name.startswith("~") or (Path(name).is_absolute() and len(Path(name).parts) > 1):
        return Path(name).name
    return name
