"""Files that lie beside a model's weights: which of them come along into a folder made from it, and which never do."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from armor_recipes.errors import InputError

LICENCES = ("license*", "licence*", "notice*", "use_policy*", "copying*")
TOKENIZERS = (
    "tokenizer*",
    "*.model",
    "*.tiktoken",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",
    "chat_template*",
    "additional_chat_templates/*.jinja",
)
PROCESSORS = ("*preprocessor_config.json", "*processor_config.json", "image_processor*.json", "feature_extractor*.json")
#: By name, whatever their suffix: they describe weights, an adapter or a quantisation that the new folder does not have.
_STALE = (
    "*.index.json",
    "adapter_config.json",
    "adapter_model*",
    "quant_config.json",
    "quantize_config.json",
    "hf_quant_config.json",
    "trainer_state.json",
    "optimizer*",
    "scheduler*",
    "rng_state*",
)
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data", ".ot")


@dataclass(frozen=True, slots=True)
class Companions:
    """What is copied, name within the folder → content, and the names of files that were left behind, sorted."""

    files: Mapping[str, bytes]
    left_out: tuple[str, ...] = ()


def companions(folder: Path, patterns: Iterable[str]) -> Companions:
    """The files of a model's folder that match one of the patterns (in lower case), with the Python files that they name.

    A JSON file whose `auto_map` names Python files that are not there loses it: who trusts remote code would meet an error.
    A link that leads out of the folder (other than into the hub's own cache) is not followed: it stays behind.

    Raises InputError for a file that cannot be read.
    """
    names = sorted(_files(folder))
    wanted = tuple(patterns)
    taken = [name for name in names if _matches(name, wanted) and not is_stale(name) and is_inside(folder, name)]
    files = {name: _read(folder / name) for name in taken}
    code = {name for content in files.values() for name in _code_files(_json(content))}
    if code and all(name in names and is_inside(folder, name) for name in code):
        scripts = [name for name in names if name.endswith(".py") and "/" not in name and is_inside(folder, name)]
        files |= {name: _read(folder / name) for name in scripts}  # those named import others
    files = {name: _with_code_that_is_there(content, files.keys()) for name, content in files.items()}
    return Companions(files, tuple(name for name in names if name not in files))


def is_stale(name: str) -> bool:
    """Whether a file is weights, or describes weights, an adapter or a quantisation that a new folder does not have."""
    lower = name.lower()
    return Path(lower).suffix in _WEIGHTS or _matches(lower, _STALE)


def is_inside(folder: Path, name: str) -> bool:
    """Whether a file of the folder lies in it once links are followed, or in the hub's cache that the folder is part of."""
    real, home = (folder / name).resolve(), folder.resolve()
    blobs = home.parents[1] / "blobs" if home.parent.name == "snapshots" else home
    return real.is_relative_to(home) or real.is_relative_to(blobs)


def without_missing_code(config: Mapping[str, Any], there: Iterable[str]) -> dict[str, Any]:
    """The JSON object without its `auto_map` where that names a Python file that is not there."""
    present = set(there)
    if all(name in present for name in _code_files(config)):
        return dict(config)
    return {key: value for key, value in config.items() if key != "auto_map"}


def _with_code_that_is_there(content: bytes, there: Iterable[str]) -> bytes:
    parsed = _json(content)
    kept = without_missing_code(parsed, there)
    if kept == parsed:
        return content
    return (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()


def _files(folder: Path) -> Iterator[str]:
    for path in folder.iterdir():
        if path.is_file() and not fnmatchcase(path.name, ".*.lock"):  # of a run whose output lies in the model's folder
            yield path.name
        elif path.is_dir() and not path.name.startswith("."):
            yield from (f"{path.name}/{inner.name}" for inner in path.iterdir() if inner.is_file())


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name.lower(), pattern) for pattern in patterns)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(
            f"{path} belongs to the model and cannot be read ({error.strerror}): correct its permissions, or remove it"
        ) from error


def _json(content: bytes) -> dict[str, Any]:
    """The content as a JSON object; empty where it is something else."""
    if b'"auto_map"' not in content:
        return {}
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def _code_files(config: Mapping[str, Any]) -> set[str]:
    """Python files of this folder that `auto_map` names: `file.Class`, or several in a list; not those of another repository."""
    auto_map = config.get("auto_map")
    entries = list(auto_map.values()) if isinstance(auto_map, dict) else [auto_map]
    flat = [one for entry in entries for one in (entry if isinstance(entry, list) else [entry])]
    return {f"{one.rpartition('.')[0]}.py" for one in flat if isinstance(one, str) and "--" not in one}
