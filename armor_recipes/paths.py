"""Paths as people write them, and where the tool keeps what it measured."""

from __future__ import annotations

import errno
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


def no_path(error: BaseException | None) -> str:
    """What a path is that the system refuses, in a sentence, if that is why `error` was raised; else nothing."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            named = str(error.filename or "")
            return f"{named if len(named) <= 80 else f'{named[:79]}…'} is no path here ({error.strerror}): name another one"
        if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop from "):  # of Path.resolve
            return f"{str(error).removeprefix('Symlink loop from ')} is no path here (its links lead to itself): name another one"
        error = error.__cause__
    return ""


def cache_folder(name: str) -> Path:
    """`$XDG_CACHE_HOME/armor-recipes/NAME`, where that is set and absolute, else below `~/.cache`."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "armor-recipes" / name
