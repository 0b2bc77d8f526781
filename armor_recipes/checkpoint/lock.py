"""One run at a time on an output: an advisory lock on a hidden file beside it, `out/.model.lock` for `out/model`.

- The kernel gives the lock up when the process ends, however it ends. A file that a killed process leaves is harmless: the next
  run takes it over.
- The file is removed by the one who holds the lock, before it is given up. Who had opened it by then gets the lock of a file that
  is no longer there, sees that, and starts again with a new one. So no two ever hold it at once.
- Links are followed first: two paths to one folder have one lock. Another thread or a forked child is another run.
- Some file systems have no such locks (NFS without a lock service, Lustre without `flock`). There what the file says decides: an
  output is refused unless it names a process of this host that has ended. Two runs that start in the same instant are not
  told apart. On Windows nothing is locked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from armor_recipes.errors import LockedError, RecipeError
from armor_recipes.exhaustion import is_disk_full

if sys.platform != "win32":
    import fcntl

_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
#: How often an opened file may have been removed, or its folder, by a run that ended just then.
_TRIES = 100


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of an output folder, which need not exist. Missing parents are made, and removed where they stay empty.

    Raises:
        LockedError: at once, where another run holds it; the message says which.
        RecipeError: where no file can be made beside the folder.
    """
    if sys.platform == "win32":
        yield
        return
    target = path.resolve()
    missing = [folder for folder in target.parents if not folder.exists()]
    file = lock_file(target)
    try:
        descriptor = _acquired(file)
    except OSError as error:
        _remove_empty(missing)
        if is_disk_full(error):
            raise
        raise RecipeError(f"output.path {path} cannot be locked ({file}: {error.strerror}): choose another") from error
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:  # and not a child that was forked meanwhile
            _release(file, descriptor)
            _remove_empty(missing)


def lock_file(target: Path) -> Path:
    """The lock's file, for a path without links."""
    return target.with_name(f".{target.name}.lock")


def holder(target: Path) -> dict[str, Any]:
    """Whom the lock's file names, for a path without links: `process`, `host` and `since`.

    It is empty where it names nobody, or a process of this host that has ended. Nothing is locked for that, so that no run is
    refused because somebody looked.
    """
    try:
        found = json.loads(lock_file(target).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    named = isinstance(found, dict) and isinstance(found.get("process"), int)
    return found if named and not _names_one_that_ended(found) else {}


def host() -> str:
    """The name of this machine."""
    return socket.gethostname() or "host"


def has_ended(process: int) -> bool:
    """Whether it is certain that no process of this machine has that number."""
    if os.name == "nt":  # where signal 0 is no question but Ctrl+C
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):  # nobody has this number, or nobody can
        return True
    except OSError:
        return False  # it lives, and belongs to somebody else
    return False


def _acquired(file: Path) -> int:
    """A descriptor of the file that has this name, with the lock on it and its owner's name in it."""
    missing: OSError | None = None
    for _ in range(_TRIES):
        try:
            _make_folder(file.parent)
            descriptor = _open(file)
        except FileNotFoundError as error:
            missing = error
            continue
        missing = None
        with contextlib.suppress(FileNotFoundError):
            try:
                _lock(file, descriptor)
            except BaseException:
                os.close(descriptor)
                raise
            try:
                if _is_named(file, descriptor):
                    _sign(file, descriptor)
                    return descriptor
            except BaseException:
                _release(file, descriptor)
                raise
            os.close(descriptor)
    if missing is not None:
        raise missing
    raise LockedError(f"other runs begin and end at {file} all the time: choose another output.path")


def _make_folder(folder: Path) -> None:
    """The folder, with its parents. Raises FileNotFoundError where one of them goes as it is made: the run that made it ended."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:  # it was there when it was made, and is gone, or something else has its name
        if not stat.S_ISDIR(Path(error.filename).stat().st_mode):
            raise


def _open(file: Path) -> int:
    """The file, made if it is not there. One that another user left can be locked, if not written."""
    try:
        return os.open(file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except PermissionError:
        return os.open(file, os.O_RDONLY | os.O_NOFOLLOW)


def _lock(file: Path, descriptor: int) -> None:
    """Take the lock. Raises LockedError where another run has it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = _owner(descriptor)
        if error.errno in _TAKEN:
            raise LockedError(_refusal(file, owner)) from error
        if error.errno not in _NO_LOCKS:
            raise
        if owner and not _names_one_that_ended(owner):
            raise LockedError(
                f"{_refusal(file, owner)} (the file system has no locks: if you know that the run has ended, remove {file})"
            ) from error


def _names_one_that_ended(owner: dict[str, Any]) -> bool:
    process = owner.get("process")
    return owner.get("host") == host() and isinstance(process, int) and has_ended(process)


def _is_named(file: Path, descriptor: int) -> bool:
    """Whether the open file is the one that has the name."""
    try:
        return os.path.samestat(file.lstat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _sign(file: Path, descriptor: int) -> None:
    if not os.access(file, os.W_OK):  # another user's
        return
    owner = {"process": os.getpid(), "host": host(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(owner) + "\n").encode(), 0)


def _owner(descriptor: int) -> dict[str, Any]:
    """Whom the file names; empty where it names nobody."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _release(file: Path, descriptor: int) -> None:
    with contextlib.suppress(OSError):  # a file that stays is harmless
        if _is_named(file, descriptor):
            file.unlink()
    with contextlib.suppress(OSError):  # the file system has no locks
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing is not enough where a child has the same open file
    os.close(descriptor)


def _remove_empty(folders: list[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):  # something is in it
            folder.rmdir()


def _refusal(file: Path, owner: dict[str, Any]) -> str:
    target = file.with_name(file.name.removeprefix(".").removesuffix(".lock"))
    who = (
        f"process {owner.get('process')} on {owner.get('host')}, since {owner.get('since')}" if owner else "just begun"
    )
    return f"{target} is being written by another run ({who}): wait for its end, or choose another output.path"
