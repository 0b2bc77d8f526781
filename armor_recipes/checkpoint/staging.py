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
import itertools
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from armor_recipes.checkpoint.lock import has_ended, host
from armor_recipes.errors import ArmorError, QualityError, RecipeError, ResourceError
from armor_recipes.exhaustion import is_disk_full, is_out_of_memory

_MANIFEST, _CONFIG = "armor_manifest.json", "config.json"
#: What `save_pretrained` of models, tokenizers and processors writes.
_OF_SAVE_PRETRAINED = (
    _CONFIG,
    "generation_config.json",
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)
#: What tells of a run, and is no function of its inputs.
REPORT_FILES = ("report.json", "report.html", "report.md")
#: What this tool writes besides, for folders whose manifest does not list its files yet.
_OF_OLD_MANIFESTS = ("README.md", "recipe.yaml", *REPORT_FILES, _MANIFEST, "LICEN[CS]E*", "NOTICE*", "USE_POLICY.md")
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NO_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)
#: The attribute of an error that names a temporary folder which is not to be removed.
_KEPT = "kept_folder"


@contextmanager
def staged(path: Path, *, overwrite: bool, precious: Mapping[str, Path] | None = None) -> Iterator[Path]:
    """Yield an empty temporary folder that becomes `path` when the block ends well and vanishes when it does not.

    A missing or empty folder at `path` is always filled. Links in `path` are followed: what they point to is replaced. See
    `check_destination` for what never is. A folder that cannot be put in its place once the block has ended is kept beside it.

    Raises:
        RecipeError: if something is at `path` already and `overwrite` is false, or it must not be replaced.
        ResourceError: if the disk is full.
    """
    target = path.resolve()
    check_destination(target, overwrite=overwrite, precious=precious)
    with _disk_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        recover(target)
        staging = _sibling(target, "tmp")
        staging.mkdir()
        try:
            yield staging
            with kept_aside(staging, target):
                _flush(staging)
                _replace(staging, target, overwrite=overwrite, precious=precious)
                shutil.rmtree(staging, ignore_errors=True)  # what was replaced
        except BaseException as error:
            if getattr(error, _KEPT, None) != staging:
                shutil.rmtree(staging, ignore_errors=True)
            raise


@contextmanager
def tried(path: Path) -> Iterator[Path]:
    """Yield an empty folder where `staged` will make its own, to try there what is to be done at the end; it vanishes.

    Raises RecipeError where no such folder can be made.
    """
    target = path.resolve()
    folder = _sibling(target, "tmp")
    try:
        folder.mkdir()
    except OSError as error:
        if is_disk_full(error):
            raise
        raise RecipeError(
            f"output.path {path}: {folder}, in which it is written first, cannot be made ({error.strerror}): choose another"
        ) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def kept_aside(folder: Path, output: Path) -> Iterator[None]:
    """Keep a folder in which the weights are written in full beside `output`, where what follows goes wrong: as `NAME.unverified`,
    or `NAME.rejected` where all that is wrong is its quality.

    The error says where it is, and whether more than the weights is there. What ran out is a ResourceError.
    """
    before = _identity(folder)
    try:
        yield
    except BaseException as error:
        target, now = output.resolve(), _identity(folder)
        if _identity(target) == before:
            said = f"the new checkpoint is complete and in its place, {target}"
        elif now != before:
            raise
        else:
            said = _kept(folder, target, error)
        if isinstance(error, ArmorError):
            raise _with_mark(type(error)(f"{error}; {said}"), error) from error
        if is_out_of_memory(error) or is_disk_full(error):
            what = "out of memory" if is_out_of_memory(error) else "no space left on the disk"
            raise _with_mark(ResourceError(f"{what} after the weights were written: {error}; {said}"), error) from error
        error.add_note(said)
        raise


def _kept(folder: Path, target: Path, error: BaseException) -> str:
    """Move a folder beside its place, or leave it where it is if that cannot be; says which."""
    whole = "tensors" in _json_object(folder / _MANIFEST)
    kept = "what was written is complete and kept in" if whole else "the weights, written in full, are kept in"
    aside = _free_sibling(target, "rejected" if isinstance(error, QualityError) else "unverified")
    with contextlib.suppress(OSError):
        _flush(folder)
    try:
        folder.rename(aside)
    except OSError:
        setattr(error, _KEPT, folder)
        return f"{kept} {folder}: move that away before the next run on {target}, which would remove it"
    return f"{kept} {aside}"


def _with_mark(error: ArmorError, cause: BaseException) -> ArmorError:
    """The error, marked as its cause is."""
    setattr(error, _KEPT, getattr(cause, _KEPT, None))
    return error


def _identity(folder: Path) -> tuple[int, int] | None:
    """What a folder stays through all renames; None where there is none."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _free_sibling(target: Path, suffix: str) -> Path:
    numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
    paths = (target.with_name(f"{target.name}.{suffix}{number}") for number in numbers)
    return next(path for path in paths if not path.exists())


def check_destination(path: Path, *, overwrite: bool, precious: Mapping[str, Path] | None = None) -> None:
    """Refuse early what `staged` would refuse at the end of a long run; nothing is changed.

    Replaced is only a folder that this tool or `save_pretrained` wrote, and in which nothing else lies. Never the working
    directory or the home folder, nor what holds them, nor what holds one of the `precious` paths (what it is → where).

    Raises `RecipeError`.
    """
    target = path.resolve()
    if not target.name:
        raise RecipeError(f"output.path {path} is the root of the file system: name a folder")
    if not target.exists():
        return
    if not target.is_dir():
        raise RecipeError(f"output.path {path} exists and is not a folder: choose another path")
    places = {"the working directory": Path.cwd(), "the home folder": Path.home(), **(precious or {})}
    for what, place in places.items():
        if place.resolve().is_relative_to(target):
            raise RecipeError(f"output.path {path} is or holds {what}: it is never replaced; choose another path")
    if os.path.ismount(target):
        raise RecipeError(
            f"output.path {path} is the root of a mounted file system, in whose place no folder can be put: name a folder inside it"
        )
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise RecipeError(f"output.path {path} exists: pass --overwrite to replace it, or choose another path")
    _check_ours(path, target)
    _check_movable(path, target)


def _check_ours(path: Path, target: Path) -> None:
    """Raise RecipeError unless the folder is a model's, and holds what this tool or `save_pretrained` writes and no more."""
    manifest, config = _json_object(target / _MANIFEST), _json_object(target / _CONFIG)
    if "format_version" not in manifest and not isinstance(config.get("model_type"), str):
        raise RecipeError(
            f"output.path {path} is no model (no {_MANIFEST} of this tool, no model_type in a {_CONFIG}), so --overwrite does not "
            "delete it. Choose another path, or remove it yourself"
        )
    listed = manifest.get("files")
    known = {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()
    patterns = (*_OF_SAVE_PRETRAINED, *(_OF_OLD_MANIFESTS if manifest else ()))
    for name in files_below(target):
        if name not in known and not any(fnmatchcase(name, pattern) for pattern in patterns):
            raise RecipeError(
                f"output.path {path} holds {name}, which neither this tool nor save_pretrained wrote, so --overwrite does not "
                "delete the folder. Choose another path, or move what is yours out of it"
            )


def _check_movable(path: Path, target: Path) -> None:
    """Raise RecipeError for another user's folder in a sticky one (`/tmp`), where only owners may rename."""
    parent = target.parent.stat()
    owners = (0, parent.st_uid, target.stat().st_uid)
    if os.name == "posix" and parent.st_mode & stat.S_ISVTX and os.geteuid() not in owners:
        raise RecipeError(
            f"output.path {path} belongs to another user, and in {target.parent} only owners may rename one: choose another path"
        )


def files_below(folder: Path) -> Iterator[str]:
    """Names of all files and links below a folder, and of empty folders with a slash behind, in order, relative to it."""
    for current, folders, files in os.walk(folder):
        folders.sort()
        here = Path(current)
        linked = [name for name in folders if (here / name).is_symlink()]
        if not files and not folders and here != folder:
            yield f"{here.relative_to(folder).as_posix()}/"
        yield from ((here / name).relative_to(folder).as_posix() for name in sorted([*files, *linked]))


def _json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none."""
    try:
        found = json.loads(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def recover(path: Path) -> None:
    """Finish what dead processes of this host left beside `path`: move a displaced old folder back, remove what can be removed."""
    target = path.resolve()
    leftovers = [folder for folder in _siblings(target) if _owner_is_dead(folder)]
    displaced = [folder for folder in leftovers if folder.name.startswith(f".{target.name}.old-")]
    if displaced and not target.exists():
        displaced[0].rename(target)
    for folder in leftovers:
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)  # another user's may stay


def discard(folder: Path, path: Path) -> None:
    """Remove a folder beside `path` in one step: what a kill leaves of it is for the next run's `recover`."""
    aside = _sibling(path, "tmp")
    with contextlib.suppress(OSError):
        folder.rename(aside)
    shutil.rmtree(aside if aside.exists() else folder, ignore_errors=True)


def _replace(staging: Path, target: Path, *, overwrite: bool, precious: Mapping[str, Path] | None) -> None:
    """Put `staging` in the place of `target`; whatever was there ends up at `staging`, or is removed."""
    # A folder that appeared while this run worked is as precious as one that was there before.
    check_destination(target, overwrite=overwrite, precious=precious)
    try:
        if not target.exists() or not any(target.iterdir()):
            staging.rename(target)
        elif not _exchange(staging, target):
            _replace_in_two_steps(staging, target)
    except OSError as error:
        if is_disk_full(error):
            raise
        raise RecipeError(
            f"output.path {target} cannot be put in place ({error.strerror}): choose another path, or free this one"
        ) from error
    sync(target.parent)


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
            sync(Path(current, name))
        sync(Path(current))


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
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
    return match is not None and has_ended(int(match[1]))


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]", "_", host())


@contextmanager
def _disk_errors(target: Path) -> Iterator[None]:
    """Turn a full disk into `ResourceError`."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ArmorError) or not is_disk_full(error):
            raise
        free = "unknown"
        with contextlib.suppress(OSError):
            free = f"{shutil.disk_usage(target.parent).free / 1e6:.0f} MB"
        raise ResourceError(
            f"no space left while writing {target} ({free} free now): free some, or set output.path"
        ) from error
