"""Samples that lie in safetensors files as the arguments of a forward pass: no tokenizer or processor is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from armor_recipes.calibration.files import TENSORS, files_of, readable
from armor_recipes.calibration.inputs import Batch, ModelInputs
from armor_recipes.errors import InputError

(SUFFIX,) = TENSORS
#: What evaluation reads beside the inputs; the model is not called with it.
LABELS = "labels"

_DTYPES = {"F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL"}


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: how many samples it has, and of each tensor the dtype (as files spell it) and the shape of one sample."""

    path: Path
    samples: int
    layout: tuple[tuple[str, str, tuple[int, ...]], ...]

    def rows(self, numbers: Sequence[int]) -> list[Batch]:
        """Some samples, each by itself `(1, …)`. Raises InputError where the file is damaged."""
        with _opened(self.path) as file:
            pieces = {name: file.get_slice(name) for name, _, _ in self.layout}
            return [{name: piece[number : number + 1] for name, piece in pieces.items()} for number in numbers]


@dataclass(frozen=True, slots=True)
class TensorFiles:
    """Samples of all files, in their order."""

    dataset: str
    shards: tuple[Shard, ...]

    def __len__(self) -> int:
        return sum(shard.samples for shard in self.shards)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors, sorted."""
        return tuple(name for name, _, _ in self.shards[0].layout)

    def rows(self, numbers: Sequence[int]) -> Batch:
        """Some samples, in that order; nothing else is read. Raises InputError where a file is damaged."""
        found: dict[int, Batch] = {}
        first = 0
        for shard in self.shards:
            mine = [number for number in numbers if first <= number < first + shard.samples]
            found.update(zip(mine, shard.rows([number - first for number in mine]) if mine else (), strict=True))
            first += shard.samples
        return {name: torch.cat([found[number][name] for number in numbers]) for name in self.names}


def is_tensors(path: Path) -> bool:
    """Whether a path is a safetensors file, a pattern of such files, or a folder that holds one."""
    if path.suffix.lower() == SUFFIX:
        return True
    return path.is_dir() and any(file.suffix.lower() == SUFFIX for file in path.iterdir())


def load_tensors(dataset: str, path: Path) -> TensorFiles:
    """Find the samples of a safetensors file, of a pattern (`part-*.safetensors`) or of a folder; headers alone are read.

    Raises InputError for what is no such file, and where tensors or files do not fit each other.
    """
    files = _files(path)
    shards = tuple(map(_shard, files))
    for shard in shards[1:]:
        if shard.layout != shards[0].layout:
            raise InputError(
                f"{shard.path} holds {_described(shard)}, and {shards[0].path} holds {_described(shards[0])}; all files of a "
                "dataset must hold the same tensors, equal in dtype and in the shape of a sample: write them again"
            )
    return TensorFiles(dataset, shards)


def check_arguments(names: Sequence[str], inputs: ModelInputs, where: str) -> None:
    """Raise InputError for a name that the model's forward pass does not take."""
    for name in names:
        if not inputs.arguments or name in inputs.arguments:
            continue
        near = get_close_matches(name, inputs.arguments, n=1, cutoff=0.0)
        raise InputError(
            f"{where} has a tensor {name!r}, which the forward pass of {inputs.name} does not take; the nearest that it takes is "
            f"{near[0]!r}: rename it, or take it out"
        )


def check_values(tensors: Batch, inputs: ModelInputs, dataset: str) -> None:
    """Raise InputError for token ids outside the vocabulary, and for numbers that are not finite."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            broken = (~tensor.isfinite()).flatten(1).sum(dim=1) if tensor.ndim > 1 else (~tensor.isfinite()).long()
            if bool(broken.any()):
                raise InputError(
                    f"{dataset}: {name} has numbers that are not finite in {int((broken > 0).sum())} of {len(tensor)} samples; "
                    "correct or remove them"
                )
        elif name.endswith("input_ids") and inputs.vocab_size is not None and tensor.numel():
            least, most = int(tensor.min()), int(tensor.max())
            if least < 0 or most >= inputs.vocab_size:
                raise InputError(
                    f"{dataset}: {name} holds the id {least if least < 0 else most}, but the model embeds {inputs.vocab_size} "
                    "tokens; write the ids of its own tokenizer"
                )


def _files(path: Path) -> list[Path]:
    if set(path.name) & set("*?[") and not path.exists():
        found = sorted(path.parent.glob(path.name))
        if not found:
            raise InputError(f"no file is called {path}; a relative path starts at the recipe that names it")
        return found
    files = files_of(path)
    for file in files:
        if file.suffix.lower() != SUFFIX:
            raise InputError(
                f"the folder {path} holds {SUFFIX} files and {file}, which is none; remove or convert it, or name a pattern like "
                f"*{SUFFIX}"
            )
    return files


def _shard(path: Path) -> Shard:
    with _opened(path) as file:
        slices = {name: file.get_slice(name) for name in sorted(file.keys())}
        shapes = {name: tuple(piece.get_shape()) for name, piece in slices.items()}
        dtypes = {name: str(piece.get_dtype()) for name, piece in slices.items()}
    if not shapes:
        raise InputError(f"{path} holds no tensor; write the arguments of the model's forward pass into it")
    for name, shape in shapes.items():
        if not shape or dtypes[name] not in _DTYPES:
            raise InputError(
                f"{path}: {name} is {dtypes[name]} of shape {list(shape)}; the first dimension of every tensor is the sample's, "
                "and values are floats, integers or truth values"
            )
    counts = {name: shape[0] for name, shape in shapes.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise InputError(f"{path}: its tensors have different numbers of samples ({listed}); write as many of each")
    samples = next(iter(counts.values()))
    if not samples:
        raise InputError(f"{path} holds no samples: the first dimension of its tensors is 0; write some, or remove it")
    return Shard(path, samples, tuple((name, dtypes[name], shape[1:]) for name, shape in shapes.items()))


def _described(shard: Shard) -> str:
    return ", ".join(f"{name} {dtype} {list(shape)}" for name, dtype, shape in shard.layout)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    with readable(path):
        try:
            with safe_open(str(path), framework="pt") as file:
                yield file
        except SafetensorError as error:
            raise InputError(f"cannot read {path} as safetensors: {error}; write the file again") from error
