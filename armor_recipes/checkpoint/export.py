"""Write a checkpoint in another format, tensor by tensor: no model is built, and one file of weights is held at a time.

| target | a packed layer becomes | from |
|---|---|---|
| `armor` | an ARMOR layer of block size 1 with identity factors, integers kept | legacy, dense 2:4, plain quantised 2:4 |
| `dense` | `P.weight`, Ŵ folded and rounded to the stored dtype: what the `folded` backend computes with | ARMOR, legacy |
| `dense-2of4` | `P.weight`, the core itself, zeros kept | ARMOR with identity factors, plain legacy |
| `sparse-24-bitmask` | `P.compressed`, `P.bitmask`, `P.shape` (`armor_recipes.checkpoint.legacy`) | the same, dense 2:4 |

Of plain quantised layers `dense` writes the dequantised weight; that their activations were quantised has no place in it. `armor`
packs those whose weights are 2:4 and whose numbers a core can hold, and leaves others as they are, counted with the reason. All
other tensors are copied as they are, and so are the files of the folder that are neither weights nor described anew.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Set
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from armor_recipes.checkpoint.companions import is_inside, is_stale, without_missing_code
from armor_recipes.checkpoint.config import (
    ROTATIONS,
    SCALE,
    TENSOR_NAMES,
    VALUES,
    LayerSpec,
    layer_specs,
    named_tensors,
    quantization_config,
    rotations_of,
    version_of,
)
from armor_recipes.checkpoint.cores import NOT_2OF4, dense_core, is_2of4, quantized_core
from armor_recipes.checkpoint.files import (
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    WEIGHTS_FILE,
    config_dtype,
    read_config,
    read_header,
    read_tensor,
    save_tensors,
)
from armor_recipes.checkpoint.header import TensorInfo
from armor_recipes.checkpoint.legacy import (
    LegacyFolder,
    is_legacy,
    legacy_config,
    legacy_tensors,
    open_legacy,
)
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.quantized import WEIGHT_PACKED, Scheme
from armor_recipes.checkpoint.reader import BIAS, check_folder, checked_layers, plain_layers, read_layer, read_plain
from armor_recipes.checkpoint.staging import REPORT_FILES, files_below
from armor_recipes.checkpoint.stored import BIN_FILE, BIN_INDEX
from armor_recipes.checkpoint.writer import file_hashes, manifest_hash, tensor_hashes
from armor_recipes.errors import PlanError, UnfitError
from armor_recipes.version import __version__

Target = Literal["armor", "dense", "dense-2of4", "sparse-24-bitmask"]
TARGETS: tuple[Target, ...] = get_args(Target)
_WRITTEN_ANEW = (CONFIG_FILE, INDEX_FILE, MANIFEST_FILE, *REPORT_FILES)


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export did."""

    to: Target
    layers: int
    """Packed layers that were converted."""
    nbytes: int
    """Of all tensors written."""
    left_out: tuple[str, ...]
    """Names of folders and further weight files that were not copied."""
    stay: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Linear layers that `armor` leaves as they are, by the reason."""


@dataclass(frozen=True, slots=True)
class Source:
    """A checkpoint folder whose layers can be read one by one."""

    folder: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    specs: Mapping[str, LayerSpec]
    """Layers to convert, by full module name."""
    kind: Literal["armor", "legacy", "dense", "quantized"]
    """`quantized`: plain quantised layers, of which those in `specs` are packed."""
    legacy: LegacyFolder | None = None
    """What reads the layers of a legacy folder."""
    plain: Mapping[str, Scheme] = field(default_factory=dict)
    """What plain layers are quantised to, by full module name."""
    packed: Mapping[str, LayerSpec] = field(default_factory=dict)
    """ARMOR layers beside them that stay as they are (`quantized`), tied ones among them."""
    stay: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Linear layers that are not packed, by the reason (`dense` and `quantized`)."""

    @classmethod
    def open(cls, folder: Path, linears: Collection[str] = ()) -> Source:
        """Check a folder's headers and config. Of a dense one, those of `linears` count that have 2:4 weights.

        Raises:
            CheckpointError: if the folder is damaged.
        """
        _refuse_pickled(folder)
        check_folder(folder)
        config, tensors = read_config(folder), read_header(folder)
        quantization = config.get("quantization_config")
        if is_legacy(quantization):
            legacy = open_legacy(folder, quantization, tensors)
            specs = {name: layer.spec for name, layer in legacy.layers.items()}
            return cls(folder, config, tensors, specs, "legacy", legacy)
        if quantization is not None:
            specs = checked_layers(folder, quantization, tensors)
            plain = plain_layers(folder, quantization, tensors)
            return cls(folder, config, tensors, specs, "armor", plain=plain)
        specs, stay = _dense_2of4(tensors, linears)
        return cls(folder, config, tensors, specs, "dense", stay=stay)

    @classmethod
    def packable(cls, folder: Path, linears: Set[str]) -> Source:
        """Check a folder with plain quantised layers, and find those of `linears` whose weights are 2:4, quantised or not.

        Raises:
            CheckpointError: if the folder is damaged.
        """
        source = cls.open(folder)
        packed = layer_specs(source.config.get("quantization_config"), where=str(folder / CONFIG_FILE))
        plain = source.plain
        specs, stay = _dense_2of4(source.tensors, linears - packed.keys() - plain.keys())
        for name, scheme in plain.items():
            try:
                if name not in linears:
                    raise UnfitError("no linear layer of the model as transformers builds it")
                specs[name] = LayerSpec.of(quantized_core(read_plain(name, scheme, source.tensors), name=name))
            except UnfitError as error:
                stay[error.reason] = (*stay.get(error.reason, ()), name)
        return replace(source, kind="quantized", specs=specs, packed=packed, stay=stay)

    def layer(self, name: str) -> PackedLinear:
        """Read and check one layer."""
        if self.legacy is not None:
            return self.legacy.read(name)
        if self.kind == "quantized" and name in self.plain:
            return quantized_core(read_plain(name, self.plain[name], self.tensors), name=name)
        if self.kind in ("dense", "quantized"):
            return dense_core(read_tensor(self.tensors, f"{name}.{VALUES}"))
        owner = self.specs[name].input_factor
        shared = None if owner is None else read_layer(owner, self.tensors)
        return read_layer(name, self.tensors, shared, activations=self.specs[name].activations)

    def dequantized(self, name: str) -> Tensor:
        """The weight `(O, I)` of a plain quantised layer, in the folder's dtype."""
        return read_plain(name, self.plain[name], self.tensors).dequantize(config_dtype(self.folder, self.config))

    def converts(self, tensor: str) -> bool:
        """Whether a tensor is one of a layer that is converted, bias aside."""
        name, _, part = tensor.rpartition(".")
        if self.kind == "quantized":
            return name in self.specs and part != BIAS
        return (name in self.specs and part in self.parts) or (name in self.plain and part != BIAS)

    def is_main(self, tensor: str) -> bool:
        """Whether the layer is written in this tensor's file."""
        name, _, part = tensor.rpartition(".")
        if name in self.plain:
            return part == (WEIGHT_PACKED if f"{name}.{WEIGHT_PACKED}" in self.tensors else VALUES)
        return part == self.main

    @property
    def tied(self) -> tuple[str, ...]:
        """Modules of an ARMOR checkpoint whose weight is stored under another's name, sorted."""
        if self.kind != "armor":
            return ()
        specs = layer_specs(self.config.get("quantization_config"), where=str(self.folder / CONFIG_FILE))
        return tuple(sorted(name for name, spec in specs.items() if spec.tied_to is not None))

    @property
    def main(self) -> str:
        """The part of a layer's tensor names in whose file the layer is written."""
        return VALUES if self.legacy is None else self.legacy.parts[0]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of a layer's tensors, bias aside."""
        if self.legacy is not None:
            return self.legacy.parts
        return (VALUES,) if self.kind == "dense" else (*TENSOR_NAMES, SCALE)


@dataclass(frozen=True, slots=True)
class Merge:
    """A tensor that is put together of several others, which are not written then."""

    name: str
    shape: tuple[int, ...]
    parts: Mapping[str, Callable[[Tensor, Tensor], None]]
    """Names, as they would be written, and what puts such a tensor (second argument) in its place."""


def export(
    source: Source,
    destination: Path,
    *,
    to: Target,
    ignore: Iterable[str] = (),
    merges: Iterable[Merge] = (),
    names: Mapping[str, str] | None = None,
) -> Exported:
    """Write `source` into the existing empty folder `destination` (see `armor_recipes.checkpoint.staging`).

    Args:
        source: what to convert.
        destination: an empty folder.
        to: the format.
        ignore: full names of the linear layers that stay dense, for `armor` and `sparse-24-bitmask`, whose configs list them.
        merges: what is put together of the tensors of linear layers, for `dense` and `dense-2of4`.
        names: under which names tensors are written, of those that get another.

    Raises:
        PlanError: if the source has no packed layers to convert, or factors that the format cannot hold.
        CheckpointError: if the source is damaged.
    """
    convert = _converter(source, to)
    _write_tensors(source, destination, convert, tuple(merges), names or {})
    _write_config(source, destination, to, ignore)
    left_out = _copy_rest(source, destination)
    _write_manifest(source, destination, to)
    check_folder(destination)
    nbytes = sum(info.nbytes for info in read_header(destination).values())
    layers = len(source.specs) if to == "armor" else len(source.specs) + len(source.plain)
    return Exported(to, layers, nbytes, left_out, dict(source.stay) if to == "armor" else {})


def _refuse_pickled(folder: Path) -> None:
    """Raise PlanError for a model in PyTorch files: an export copies tensors as they are, and those it does not read."""
    there = (folder / WEIGHTS_FILE).exists() or (folder / INDEX_FILE).exists()
    pickled = next((name for name in (BIN_FILE, BIN_INDEX) if (folder / name).exists()), None)
    if pickled is not None and not there:
        raise PlanError(
            f"{folder} holds its weights in PyTorch files ({pickled}), and an export reads safetensors only: load it with "
            "transformers and save it with save_pretrained first"
        )


def _check_source(source: Source, to: Target) -> None:
    """Raises PlanError where there is nothing to convert, or what it does as it runs would be lost."""
    if rotations_of(source.config.get("quantization_config")):
        raise PlanError(
            f"{source.folder} rotates activations as it runs ({ROTATIONS} in its config.json), which no other form of its weights "
            "does: load it as it is"
        )
    if source.kind == "dense" and to in ("dense", "dense-2of4"):
        raise PlanError(f"{source.folder} is dense already: every stock loader reads it")
    if source.kind == "armor" and to == "armor":
        raise PlanError(f"{source.folder} is an ARMOR checkpoint already")
    if source.tied and to == "sparse-24-bitmask":
        raise PlanError(
            f"{source.folder} stores the weight of {source.tied[0]} under the name of another module that has it, too, and "
            f"{to} cannot: export to dense-2of4"
        )
    if source.plain and to not in ("dense", "armor"):
        raise PlanError(
            f"{source.folder} holds {len(source.plain)} plain quantised layers, the first {min(source.plain)}, for which {to} has "
            "no place: export to dense"
        )
    if not source.specs and (to == "armor" or not source.plain):
        raise PlanError(
            f"{source.folder} has no linear layer with 2:4 weights: there is nothing to convert to {to}{_counted(source.stay)}"
        )


def _counted(stay: Mapping[str, tuple[str, ...]]) -> str:
    """How many layers are not packed, by the reason."""
    found = "; ".join(f"{len(names)} {reason}" for reason, names in stay.items())
    return f" ({found})" if found else ""


def _dense_2of4(
    tensors: Mapping[str, TensorInfo], linears: Collection[str]
) -> tuple[dict[str, LayerSpec], dict[str, tuple[str, ...]]]:
    """Those of the linear layers with a dense weight in the files that are 2:4, and the others by the reason."""
    dense = [name for name in sorted(linears) if f"{name}.{VALUES}" in tensors]
    sparse = [name for name in dense if is_2of4(read_tensor(tensors, f"{name}.{VALUES}"))]
    other = tuple(name for name in dense if name not in set(sparse))
    return dict.fromkeys(sparse, LayerSpec((1, 1))), {NOT_2OF4: other} if other else {}


def _converter(source: Source, to: Target) -> Callable[[str], dict[str, Tensor]]:
    """A function from a layer's name to its tensors in the new format, by their names after the module's."""
    _check_source(source, to)

    def dense(name: str) -> dict[str, Tensor]:
        if name in source.plain:
            return {VALUES: source.dequantized(name)}
        packed = source.layer(name)
        return {VALUES: packed.fold(packed.dtype, name=name)}

    def plain(name: str) -> PackedLinear:
        packed = source.layer(name)
        if not packed.is_plain:
            raise PlanError(
                f"{name} in {source.folder} has factors other than the identity, or a quantised core: its folded weight is not "
                f"2:4, and {to} cannot hold factors or integers. Export to dense"
            )
        return packed

    match to:
        case "armor":
            return lambda name: named_tensors(source.layer(name))
        case "dense":
            return dense
        case "dense-2of4":
            return lambda name: {VALUES: plain(name).unpack(name=name)[0]}
        case "sparse-24-bitmask":
            return lambda name: legacy_tensors(plain(name))


def _write_tensors(
    source: Source,
    destination: Path,
    convert: Callable[[str], dict[str, Tensor]],
    merges: tuple[Merge, ...],
    names: Mapping[str, str],
) -> None:
    """The files keep their names, and each layer stays in the file of its values; a merged tensor is in that of its first part."""
    merge_of = {part: merge for merge in merges for part in merge.parts}
    places: dict[str, str] = {}
    total = 0
    for file in sorted({info.file for info in source.tensors.values()}):
        held: dict[str, Tensor] = {}
        for tensor in (name for name, info in source.tensors.items() if info.file == file):
            name, packed = tensor.rpartition(".")[0], source.converts(tensor)
            merge = merge_of.get(f"{name}.{VALUES}" if packed else tensor)
            if merge is not None:
                if names.get(merge.name, merge.name) not in {*places, *held}:
                    held[names.get(merge.name, merge.name)] = _merged(merge, source, convert)
            elif not packed:
                held[names.get(tensor, tensor)] = read_tensor(source.tensors, tensor)
            elif source.is_main(tensor):
                made = {f"{name}.{new}": value.contiguous() for new, value in convert(name).items()}
                held.update({names.get(new, new): value for new, value in made.items()})
        if held:
            save_tensors(held, destination / file.name, {"format": "pt"})
        places.update(dict.fromkeys(held, file.name))
        total += sum(tensor.nbytes for tensor in held.values())
    if not (source.folder / WEIGHTS_FILE).exists():
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        _write_json(destination / INDEX_FILE, index)


def _merged(merge: Merge, source: Source, convert: Callable[[str], dict[str, Tensor]]) -> Tensor:
    """All parts in their places, from whichever files."""
    whole: Tensor | None = None
    for part, put in merge.parts.items():
        name, _, kind = part.rpartition(".")
        packed = (name in source.specs or name in source.plain) and kind == VALUES
        value = convert(name)[VALUES] if packed else read_tensor(source.tensors, part)
        whole = value.new_empty(merge.shape) if whole is None else whole
        put(whole, value)
    assert whole is not None
    return whole


def _write_config(source: Source, destination: Path, to: Target, ignore: Iterable[str]) -> None:
    config = {key: value for key, value in source.config.items() if key != "quantization_config"}
    config = without_missing_code(config, [path.name for path in source.folder.iterdir()])
    if to == "sparse-24-bitmask":
        config |= {"quantization_config": legacy_config(list(ignore)), **_old_rope(source)}
    elif to == "armor":
        config |= {"quantization_config": _armor_config(source, list(ignore))}
    _write_json(destination / CONFIG_FILE, config)


def _armor_config(source: Source, ignore: list[str]) -> dict[str, Any]:
    """Of what was packed, and of ARMOR layers and plain quantised ones that stay."""
    own = {name: spec for name, spec in source.packed.items() if spec.tied_to is None}
    shared = {name: spec.input_factor for name, spec in own.items() if spec.input_factor is not None}
    tied = {name: spec.tied_to for name, spec in source.packed.items() if spec.tied_to is not None}
    plain = {name: scheme for name, scheme in source.plain.items() if name not in source.specs}
    return quantization_config({**own, **source.specs}, ignore, shared, tied, plain)


def _old_rope(source: Source) -> dict[str, Any]:
    """The rotary embedding as transformers 4 spells it: that release reads this format, and would fall back to a default."""
    rope = source.config.get("rope_parameters")
    if not isinstance(rope, Mapping):
        return {}
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise PlanError(
            f"{source.folder / CONFIG_FILE}: rope_parameters differ between layers, which transformers 4, the last that reads "
            "sparse-24-bitmask, spells in another way for each architecture: export to dense-2of4"
        )
    scaling = {key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")}
    plain = scaling.get("rope_type", "default") == "default"
    kept = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
    return {**kept, "rope_scaling": None if plain else scaling}


def _copy_rest(source: Source, destination: Path) -> tuple[str, ...]:
    left_out = []
    used = {info.file.name for info in source.tensors.values()}
    for path in sorted(source.folder.iterdir()):
        if path.name in _WRITTEN_ANEW or path.name in used:
            continue
        if path.is_file() and not is_stale(path.name) and is_inside(source.folder, path.name):
            shutil.copyfile(path, destination / path.name)
        else:
            left_out.append(path.name)
    return tuple(left_out)


def _write_manifest(source: Source, destination: Path, to: Target) -> None:
    content = {
        "format_version": version_of(read_config(destination).get("quantization_config")),
        "armor_recipes": __version__,
        "export": {"to": to, "source_manifest_sha256": manifest_hash(source.folder)},
        "files": sorted({*files_below(destination), MANIFEST_FILE}),
        "file_hashes": file_hashes(destination),
        "tensors": tensor_hashes(destination),
    }
    _write_json(destination / MANIFEST_FILE, content, sort_keys=False)


def _write_json(file: Path, content: Mapping[str, Any], *, sort_keys: bool = True) -> None:
    file.write_text(json.dumps(content, indent=2, sort_keys=sort_keys) + "\n", encoding="utf-8")
