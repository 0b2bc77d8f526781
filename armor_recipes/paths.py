"""Paths as people write them, and where the tool keeps what it measured."""

from __future__ import annotations

import os
from pathlib import Path

from armor_recipes.errors import InputError


def user_path(path: str | Path) -> Path:
    """The path with `~` and `~user` at its start replaced by that home folder; nothing else is changed.

    Raises InputError where there is no such home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise InputError(f"{path}: {error}; write the path out") from error


def cache_folder(name: str) -> Path:
    """`$XDG_CACHE_HOME/armor-recipes/NAME`, where that is set and absolute, else below `~/.cache`."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "armor-recipes" / name
