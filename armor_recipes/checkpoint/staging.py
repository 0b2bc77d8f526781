"""A folder that is either not there or complete: written beside its place, flushed to disk, then renamed into it.

For an output `out/model` of process 4711 on `host` the temporary folder is `out/.model.tmp-host-4711-<random>`.

- The rename of a new folder is atomic. Replacing one exchanges the two in a single step where the kernel can
  (`renameat2` with `RENAME_EXCHANGE`, Linux), so that a crash leaves the old folder or the new one.
- Elsewhere two renames are needed: the old folder first moves to `.model.old-…`. A crash between the two leaves no
  folder in place, but both beside it; the next run on this output first moves the old one back.
- A killed process cannot clean up. The next run on the same output removes what dead processes of this host left
  behind; folders of other hosts are left alone, since nobody here can tell whether their owner lives.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from armor_recipes.errors import RecipeError, ResourceError

OURS = ("config.json", "armor_manifest.json")
"""A non-empty folder is replaced only if it holds one of these: anything else may be somebody's data."""
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT)


@contextmanager
def staged(path: Path, *, overwrite: bool) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends well and vanishes when it does not.

    A missing or empty folder at `path` is always filled. Links in `path` are followed: what they point to is replaced.

    Raises:
        RecipeError: if something is at `path` already and `overwrite` is false, or it does not look like a model.
        ResourceError: if the disk is full.
    """
    target = path.resolve()
    check_destination(target, overwrite=overwrite)
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        staging = _sibling(target, "tmp")
        staging.mkdir()
        try:
            yield staging
            _flush(staging)
            _replace(staging, target, overwrite=overwrite)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def check_destination(path: Path, *, overwrite: bool) -> None:
    """Refuse early what `staged` would refuse at the end of a long run; nothing is changed. Raises `RecipeError`."""
    target = path.resolve()
    if not target.name:
        raise RecipeError(f"output.path {path} is the root of the file system: name a folder")
    if not target.exists():
        return
    if not target.is_dir():
        raise RecipeError(f"output.path {path} exists and is not a folder: choose another path")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise RecipeError(f"output.path {path} exists: pass --overwrite to replace it, or choose another path")
    if not any((target / name).is_file() for name in OURS):
        raise RecipeError(
            f"output.path {path} holds neither {' nor '.join(OURS)}: it is no model, so --overwrite does not delete "
            "it. Choose another path, or remove it yourself"
        )


def recover(path: Path) -> None:
    """Finish what dead processes of this host left beside `path`: move a displaced old folder back, remove the rest."""
    target = path.resolve()
    leftovers = [folder for folder in _siblings(target) if _owner_is_dead(folder)]
    displaced = [folder for folder in leftovers if folder.name.startswith(f".{target.name}.old-")]
    if displaced and not target.exists():
        displaced[0].rename(target)
    for folder in leftovers:
        if folder.exists():
            shutil.rmtree(folder)


def _replace(staging: Path, target: Path, *, overwrite: bool) -> None:
    """Put `staging` in the place of `target`; whatever was there ends up at `staging`, or is removed."""
    # A folder that appeared while this run worked is as precious as one that was there before.
    check_destination(target, overwrite=overwrite)
    if not target.exists() or not any(target.iterdir()):
        staging.rename(target)
    elif not _exchange(staging, target):
        _replace_in_two_steps(staging, target)
    _sync(target.parent)


def _replace_in_two_steps(staging: Path, target: Path) -> None:
    displaced = _sibling(target, "old")
    try:
        target.rename(displaced)
        staging.rename(target)
    finally:
        if not target.exists():
            displaced.rename(target)
    shutil.rmtree(displaced)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; False where the system or the file system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    if renameat2 is None:
        return False
    paths = os.fsencode(first), os.fsencode(second)
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _NO_EXCHANGE:
        return False
    raise OSError(code, os.strerror(code), str(second))


def _flush(folder: Path) -> None:
    """Force everything below `folder` to disk, files before the folders that name them."""
    for current, _, files in os.walk(folder, topdown=False):
        for name in files:
            _sync(Path(current, name))
        _sync(Path(current))


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows cannot open a folder
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sibling(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{_host()}-{os.getpid()}-{secrets.token_hex(4)}")


def _siblings(target: Path) -> list[Path]:
    prefixes = tuple(f".{target.name}.{kind}-" for kind in ("old", "tmp"))
    return sorted(folder for folder in target.parent.iterdir() if folder.name.startswith(prefixes) and folder.is_dir())


def _owner_is_dead(folder: Path) -> bool:
    match = re.search(rf"\.(?:tmp|old)-{re.escape(_host())}-(\d+)-[0-9a-f]{{8}}$", folder.name)
    if match is None or os.name == "nt":  # on Windows signal 0 is no question but Ctrl+C
        return False
    try:
        os.kill(int(match[1]), 0)
    except (ProcessLookupError, OverflowError):  # nobody has this number, or nobody can
        return True
    except OSError:
        return False  # it lives, and belongs to somebody else
    return False


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname()) or "host"


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk, told by errno or (safetensors) by the text alone, into `ResourceError`."""
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in _OUT_OF_SPACE or "os error 28" in str(error)
        if not full:
            raise
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(target.parent).free / 1e6:.0f} MB"
        raise ResourceError(
            f"no space left while writing {target} ({free} free now): free some, or set output.path"
        ) from error
