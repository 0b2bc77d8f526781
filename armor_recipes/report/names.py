"""Names of datasets, models and outputs as others may read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def without_folders(name: str) -> str:
    """A dataset's, model's or output's name; an absolute path or one below a home folder by its last part alone."""
    if name.startswith("~") or (Path(name).is_absolute() and len(Path(name).parts) > 1):
        return Path(name).name
    return name


def shared(value: Any) -> Any:
    """Plain data with `without_folders` of all its texts."""
    if isinstance(value, dict):
        return {key: shared(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [shared(inner) for inner in value]
    return without_folders(value) if isinstance(value, str) else value
