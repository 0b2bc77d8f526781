"""Hold a folder against its own manifest: the same tensors, byte for byte, as when it was written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from armor_recipes.checkpoint.config import FORMAT_VERSION
from armor_recipes.checkpoint.files import MANIFEST_FILE, read_config, read_header
from armor_recipes.checkpoint.header import read_json, shown
from armor_recipes.checkpoint.reader import check_folder, format_version, read_layers
from armor_recipes.checkpoint.writer import tensor_hashes
from armor_recipes.errors import CheckpointError, VerificationError
from armor_recipes.paths import user_path


@dataclass(frozen=True, slots=True)
class Verified:
    """A folder in which every tensor has the bytes that its manifest promises."""

    tensors: int
    nbytes: int
    layers: int
    """Packed layers, whose contents were checked as well."""
    format_version: int


def verify(folder: Path) -> Verified:
    """Check headers and packed layers as a loader does, then the SHA-256 of every tensor against `armor_manifest.json`.

    The manifest lies beside the tensors: this finds damage and mistakes, and no forgery that rewrites both.

    Raises:
        CheckpointError: if the folder or its manifest is damaged or of a later format version.
        VerificationError: naming every tensor that differs, is missing or is not in the manifest.
    """
    folder = user_path(folder)
    manifest = folder / MANIFEST_FILE
    content = read_json(manifest)
    version, promised = format_version(folder), content.get("tensors")
    if not isinstance(promised, dict) or not all(isinstance(value, str) for value in promised.values()):
        raise CheckpointError(f"{manifest}: tensors is {shown(promised)}; it must map names to SHA-256")
    check_folder(folder)
    found = tensor_hashes(folder)
    problems = [f"{name}: {_difference(name, found, promised)}" for name in sorted(found.keys() | promised.keys())]
    wrong = [problem for problem in problems if not problem.endswith(": ")]
    if wrong:
        raise VerificationError(f"{folder} is not what {MANIFEST_FILE} says:\n" + "\n".join(wrong))
    layers = read_layers(folder) if read_config(folder).get("quantization_config") is not None else {}
    nbytes = sum(info.nbytes for info in read_header(folder).values())
    return Verified(len(found), nbytes, len(layers), version or FORMAT_VERSION)


def _difference(name: str, found: dict[str, str], promised: dict[str, str]) -> str:
    if name not in found:
        return "is in the manifest, but in no file"
    if name not in promised:
        return "is in a file, but not in the manifest"
    return "" if found[name] == promised[name] else f"has SHA-256 {found[name]}, the manifest {promised[name]}"
