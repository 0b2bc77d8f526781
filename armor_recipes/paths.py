"""Paths as people write them."""

from __future__ import annotations

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
