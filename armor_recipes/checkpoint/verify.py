"""Hold a folder against its own manifest: the same tensors and files, byte for byte, as when it was written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from armor_recipes.checkpoint.companions import is_inside
from armor_recipes.checkpoint.config import FORMAT_VERSION
from armor_recipes.checkpoint.export import Source
from armor_recipes.checkpoint.files import MANIFEST_FILE, read_tensor
from armor_recipes.checkpoint.header import read_json, shown
from armor_recipes.checkpoint.reader import format_version
from armor_recipes.checkpoint.staging import files_below
from armor_recipes.checkpoint.writer import file_hash, tensor_hash
from armor_recipes.errors import CheckpointError, VerificationError
from armor_recipes.paths import user_path
from armor_recipes.recipe.problems import Problems
from armor_recipes.recipe.recipe import hash_of
from armor_recipes.recipe.tree import plain
from armor_recipes.recipe.yaml_source import read_file

RECIPE_FILE = "recipe.yaml"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SMALL_FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True, slots=True)
class Verified:
    """A folder in which every tensor and file has the bytes that its manifest promises."""

    tensors: int
    nbytes: int
    layers: int
    """Packed layers, whose contents were checked as well."""
    format_version: int
    files: int
    """Files beside the weights whose hashes were compared, the recipe among them."""
    missing: tuple[str, ...]
    """Files that the manifest lists and that are not there."""
    infinite: Mapping[str, int]
    """How many numbers are infinite, of the tensors outside of packed layers that hold any (masks do)."""


def verify(folder: Path) -> Verified:
    """Check config and headers, then every tensor, one at a time: its SHA-256 in `armor_manifest.json`, and that no number is NaN.

    Packed layers are checked as a loader does (exactly 2 of 4 kept, finite numbers, positive scales), and files beside the
    weights against the manifest's hashes, where it has them. The manifest lies beside them: this finds damage and mistakes,
    and no forgery that rewrites both.

    Raises:
        CheckpointError: if the folder or its manifest is damaged or of a later format version.
        VerificationError: naming every tensor and file that differs, and tensors that are missing or not in the manifest.
    """
    folder = user_path(folder)
    manifest = read_json(folder / MANIFEST_FILE)
    version, promised = format_version(folder), _hashes(folder, manifest, "tensors")
    source = Source.open(folder)
    found: dict[str, str] = {}
    infinite: dict[str, int] = {}
    wrong: list[str] = []
    for name in source.tensors:
        tensor = read_tensor(source.tensors, name)
        found[name] = tensor_hash(tensor)
        nans, infinities = _not_finite(tensor)
        wrong += [f"{name}: {nans} of {tensor.numel()} numbers are NaN"] if nans else []
        infinite |= {name: infinities} if infinities else {}
    wrong += [line for name in sorted(found.keys() | promised.keys()) for line in _difference(name, found, promised)]
    there = set(files_below(folder))
    files = dict(_files(folder, manifest, there))
    wrong += [line for line in files.values() if line]
    if wrong:
        raise VerificationError(f"{folder} is not what {MANIFEST_FILE} says:\n" + "\n".join(wrong))
    for name in source.specs:
        source.layer(name)
    listed = manifest.get("files")
    names = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    return Verified(
        tensors=len(found),
        nbytes=sum(info.nbytes for info in source.tensors.values()),
        layers=len(source.specs),
        format_version=version or FORMAT_VERSION,
        files=len(files),
        missing=tuple(name for name in names if name not in there),
        infinite=infinite,
    )


def _hashes(folder: Path, manifest: Mapping[str, Any], key: str) -> dict[str, str]:
    promised = manifest.get(key)
    if not isinstance(promised, dict) or not all(isinstance(value, str) for value in promised.values()):
        raise CheckpointError(f"{folder / MANIFEST_FILE}: {key} is {shown(promised)}; it must map names to SHA-256")
    return promised


def _not_finite(tensor: Tensor) -> tuple[int, int]:
    """How many numbers are NaN, and how many infinite."""
    numbers = tensor.float() if tensor.dtype in _SMALL_FLOATS else tensor
    if numbers.dtype not in _FLOATS or bool(numbers.isfinite().all()):
        return 0, 0
    return int(numbers.isnan().sum()), int(numbers.isinf().sum())


def _difference(name: str, found: Mapping[str, str], promised: Mapping[str, str]) -> Iterator[str]:
    if name not in found:
        yield f"{name}: is in the manifest, but in no file"
    elif name not in promised:
        yield f"{name}: is in a file, but not in the manifest"
    elif found[name] != promised[name]:
        yield f"{name}: has SHA-256 {found[name]}, the manifest {promised[name]}"


def _files(folder: Path, manifest: Mapping[str, Any], there: Set[str]) -> Iterator[tuple[str, str]]:
    """Each file that is there and whose hash is known, with what is wrong with it, if anything is."""
    promised = _hashes(folder, manifest, "file_hashes") if "file_hashes" in manifest else {}
    for name, digest in promised.items():
        if "\0" in name or not is_inside(folder, name):
            raise CheckpointError(f"{folder / MANIFEST_FILE}: file_hashes: {shown(name)} is no file of this folder")
        if name in there and (folder / name).is_file():
            found = file_hash(folder / name)
            yield name, "" if found == digest else f"{name}: has SHA-256 {found}, the manifest {digest}"
    recipe = manifest.get("recipe_sha256")
    if isinstance(recipe, str) and has_recipe(folder):
        now = _recipe_hash(folder / RECIPE_FILE)
        yield RECIPE_FILE, "" if now == recipe else f"{RECIPE_FILE}: its hash is {now}, the manifest's {recipe}"


def has_recipe(folder: Path) -> bool:
    """Whether a folder holds a recipe, and no link to one elsewhere."""
    return (folder / RECIPE_FILE).is_file() and is_inside(folder, RECIPE_FILE)


def read_resolved(file: Path) -> dict[str, Any] | None:
    """The mapping that a folder's recipe is, unchecked; None for a file that cannot be read as one."""
    table = read_file(file, problems := Problems())
    resolved = None if table is None or problems.found else plain(table)
    return resolved if isinstance(resolved, dict) else None


def _recipe_hash(file: Path) -> str | None:
    """The hash of a resolved recipe, as it stands there; None for what is none."""
    resolved = read_resolved(file)
    try:
        return None if resolved is None else hash_of(resolved)
    except (KeyError, AttributeError, TypeError):  # its sections are not what a recipe's are
        return None
