"""Write a model as a Hugging Face folder, its ARMOR layers packed. Equal inputs give equal bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from armor_recipes.checkpoint.companions import without_missing_code
from armor_recipes.checkpoint.config import INPUT_FACTOR, VALUES, LayerSpec, named_tensors, quantization_config
from armor_recipes.checkpoint.files import (
    CONFIG_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    give_usual_permissions,
    read_header,
    read_tensor,
    save_tensors,
    write_whole,
)
from armor_recipes.checkpoint.header import read_json
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.quantized import QuantizedCache, QuantizedLinear, Scheme
from armor_recipes.checkpoint.reader import check_folder
from armor_recipes.checkpoint.staging import REPORT_FILES, files_below
from armor_recipes.checkpoint.stored import StoredTensors
from armor_recipes.compute.scratch import Scratch
from armor_recipes.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

L = TypeVar("L")
DEFAULT_SHARD_BYTES = 5_000_000_000
#: Keys of config.json that transformers reads and does not write, or that a run sets for itself.
_NOT_SAVED = ("attn_implementation", "_attn_implementation", "return_dict")
#: Where transformers keeps the conversions by which a model was loaded, which saving reverts.
_CONVERSIONS = "_weight_conversions"
#: Files that are no function of the inputs alone, or that hold the hashes.
_NO_FUNCTION = (MANIFEST_FILE, "README.md", "recipe.yaml", *REPORT_FILES)
_DECODER_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")


def write_checkpoint(
    model: PreTrainedModel,
    layers: Mapping[str, PackedLinear],
    destination: Path,
    *,
    dtype: torch.dtype,
    quantized: Mapping[str, QuantizedLinear] | None = None,
    caches: Mapping[str, QuantizedCache] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
    base_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    scratch: Scratch | None = None,
) -> None:
    """Write `model` into the existing folder `destination`; the model itself is left as it was.

    Args:
        model: in memory, in any float dtype. The weights of the modules named in `layers` are not written.
        layers: full module name → what is written in place of that module's weight, once where several have that weight; all
            tensors then go by the model's own names. Empty: a plain dense model, without `quantization_config`, under the names
            that every stock loader reads.
        destination: an empty folder, see `armor_recipes.checkpoint.staging`.
        dtype: what config.json names, and what the layers must be packed in.
        quantized: full module name → what is written in place of a plain layer's weight.
        caches: full name of an attention module → what is written beside it; all are quantised alike.
        dtypes: of float tensors on disk, by their names in the model; those that it does not name are in `dtype`.
        base_config: the source's config.json, of which keys are kept that saving forgets.
        max_shard_bytes: larger models are split into several files.
        scratch: where tensors lie that are cast; in memory without one.

    Raises:
        PlanError: if a layer is no linear layer of the model, or shares its weight with something that is none.
        CheckpointError: if a number does not fit `dtype`, or a layer was packed in another.
    """
    plain = quantized or {}
    check_layers(model, {**layers, **plain})
    layers, tied = stored_once(model, layers)
    shared = shared_input_factors({name: layers[name] for name, _ in model.named_modules() if name in layers})
    dense = _dense_linears(model, {*layers, *tied, *plain})
    schemes = {name: layer.scheme for name, layer in plain.items()}
    cache = next((one.text for one in (caches or {}).values()), None)
    config = quantization_config(layers, dense, shared, tied, schemes, cache) if layers or plain or caches else None
    state = _with_quantized(_state_dict(model, layers, dtypes or {}, dtype, shared, tied, scratch), plain)
    beside = {f"{name}.{part}": value for name, one in (caches or {}).items() for part, value in one.tensors.items()}
    state = dict(sorted({**state, **beside}.items())) if beside else state
    with _config_for_saving(model, config), _own_names(model, wanted=config is not None) as renamed:
        model.save_pretrained(
            destination, state_dict=state, max_shard_size=max_shard_bytes, save_original_format=renamed
        )
    for file in sorted(destination.glob("*.safetensors")):
        give_usual_permissions(file)
    _finish_config(destination / CONFIG_FILE, tuple(model.config.sub_configs), dtype, base_config or {})
    check_folder(destination)


def write_configs(
    model: PreTrainedModel,
    layers: Mapping[str, LayerSpec],
    destination: Path,
    *,
    dtype: torch.dtype,
    quantized: Mapping[str, Scheme] | None = None,
    cache: str | None = None,
    base_config: Mapping[str, Any] | None = None,
    shapes: PreTrainedModel | None = None,
) -> None:
    """Write what `write_checkpoint` does but for the weights, of which none is read: the model may be on the meta device.

    `shapes` is the model with its linear forms, where `model` was not given them yet.

    Raises as it does for the layers, and whatever transformers raises for a configuration that it does not save.
    """
    structure = model if shapes is None else shapes
    plain = quantized or {}
    check_layers(structure, {**layers, **plain})
    layers, tied = stored_once(structure, layers)
    dense = _dense_linears(structure, {*layers, *tied, *plain})
    config = quantization_config(layers, dense, None, tied, plain, cache) if layers or plain or cache else None
    with _config_for_saving(model, config):
        model.config.save_pretrained(destination)
        if model.can_generate():
            model.generation_config.save_pretrained(destination)
    _finish_config(destination / CONFIG_FILE, tuple(model.config.sub_configs), dtype, base_config or {})


def write_beside(
    destination: Path, files: Mapping[str, bytes], *, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Add to a folder what lies beside the weights: the tokenizer, and files, name → content.

    One that is there already is left alone. JSON files lose an `auto_map` whose Python files did not come along. Raises what the
    tokenizer raises.
    """
    if tokenizer is not None:
        tokenizer.save_pretrained(str(destination))
    for name, content in sorted(files.items()):
        if not (destination / name).exists():
            (destination / name).parent.mkdir(exist_ok=True)
            write_whole(destination / name, content)
    _without_missing_code(destination)


def carry_over(folder: Path, source: StoredTensors, names: Sequence[str]) -> None:
    """Add tensors of the source's files to a written folder, as they are.

    The file that takes them is written anew beside itself, so that a full disk costs none of its tensors.
    """
    header = read_header(folder)
    last = max(info.file for info in header.values())
    held = {name: read_tensor(header, name) for name, info in header.items() if info.file == last}
    added = {name: source.read(name).contiguous() for name in names}
    grown = last.with_name(f".{last.name}")
    try:
        save_tensors({**held, **added}, grown, {"format": "pt"})
        grown.replace(last)
    finally:
        grown.unlink(missing_ok=True)
    _list_in_index(folder / INDEX_FILE, added, last.name)
    check_folder(folder)


def _list_in_index(file: Path, added: Mapping[str, Tensor], shard: str) -> None:
    if not file.exists():
        return
    index = read_json(file)
    index["weight_map"] = dict(sorted({**index["weight_map"], **dict.fromkeys(added, shard)}.items()))
    size = index.get("metadata", {}).get("total_size")
    if isinstance(size, int):
        index["metadata"]["total_size"] = size + sum(tensor.nbytes for tensor in added.values())
    write_whole(file, (json.dumps(index, indent=2, sort_keys=True) + "\n").encode())


def check_layers(model: PreTrainedModel, layers: Mapping[str, object]) -> None:
    """Check that these modules can be written as ARMOR layers. Raises `PlanError` naming the module and the reason."""
    modules = dict(model.named_modules(remove_duplicate=False))
    classes = {base.__name__ for module in modules.values() for base in type(module).__mro__}
    ties = tied_modules(model)
    for name in layers:
        if not isinstance(modules.get(name), nn.Linear):
            raise PlanError(f"{name}: no linear layer of {type(model).__name__} has this name")
        other = next((other for other in ties.get(name, ()) if not isinstance(modules.get(other), nn.Linear)), None)
        if other is not None:
            raise PlanError(f"{name} shares its weight with {other}: it cannot be packed, add it to `ignore`")
        if name in classes:
            raise PlanError(f"{name} is also the name of a class in this model: a config group could not name it alone")


def tied_modules(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Map each module whose weight transformers ties → all that have this weight, first the one under which saving keeps it.

    One whose parameter goes by another name than `weight` stands there by the parameter's name.
    """
    groups: dict[str, list[str]] = {}
    for use, source in model.all_tied_weights_keys.items():
        groups.setdefault(source, [source]).append(use)
    named = [tuple(name.removesuffix(f".{VALUES}") for name in group) for group in groups.values()]
    return {name: group for group in named for name in group}


def stored_once(model: PreTrainedModel, layers: Mapping[str, L]) -> tuple[dict[str, L], dict[str, str]]:
    """The layers by the names under which their tensors are stored, and the other modules with their weights → these names."""
    ties = tied_modules(model)
    stored = {ties.get(name, (name,))[0]: layer for name, layer in layers.items()}
    return stored, {use: name for name in stored for use in ties.get(name, ())[1:]}


def shared_input_factors(layers: Mapping[str, PackedLinear]) -> dict[str, str]:
    """Map each layer whose B another one has, byte for byte → the first such layer in the order given.

    Only layers of one decoder layer (whose names are equal up to the first number) share that are of one config group: of
    one block size, core type, group size and kind of activations.
    """
    owners: dict[tuple[object, ...], str] = {}
    digests: dict[int, str] = {}
    shared = {}
    for name, layer in layers.items():
        decoder_layer = _DECODER_LAYER.match(name)
        if decoder_layer is None:
            continue
        digest = digests.setdefault(id(layer.b), "") or tensor_hash(layer.b)  # of bytes: 0.0 and -0.0 differ
        digests[id(layer.b)] = digest
        kind = layer.block_size, layer.core, layer.group_size, layer.activations
        owner = owners.setdefault((decoder_layer[0], kind, layer.b.shape, layer.b.dtype, digest), name)
        if owner != name:
            shared[name] = owner
    return shared


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Map tensor name → sha256 (hex) of its bytes, sorted. Raises `CheckpointError` if the folder cannot be read."""
    header = read_header(folder)
    return {name: tensor_hash(read_tensor(header, name)) for name in header}


def file_hashes(folder: Path) -> dict[str, str]:
    """Map file → sha256 (hex) of its bytes, sorted: those that equal runs write equal. Weights go by their tensors.

    Model card and recipe name the output's path, and the report is of one run.
    """
    names = [name for name in files_below(folder) if name not in _NO_FUNCTION and not name.endswith(".safetensors")]
    return {name: file_hash(folder / name) for name in sorted(names) if (folder / name).is_file()}


def file_hash(path: Path) -> str:
    """SHA-256 in hex of a file, read piece by piece. Raises `CheckpointError` where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error


def manifest_hash(folder: Path) -> str | None:
    """SHA-256 in hex of a folder's manifest, by which others know it; None where there is none."""
    manifest = folder / MANIFEST_FILE
    return file_hash(manifest) if manifest.is_file() else None


def tensor_hash(tensor: Tensor) -> str:
    """SHA-256 in hex of a tensor's bytes."""
    return hashlib.sha256(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _dense_linears(model: PreTrainedModel, layers: Collection[str]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]


def _state_dict(
    model: PreTrainedModel,
    layers: Mapping[str, PackedLinear],
    dtypes: Mapping[str, torch.dtype],
    dtype: torch.dtype,
    shared: Mapping[str, str],
    tied: Mapping[str, str],
    scratch: Scratch | None,
) -> dict[str, Tensor]:
    """Collect every tensor to write, by name. What shares memory in the model shares it here, and is written once."""
    state: dict[str, Tensor] = {}
    cast: dict[tuple[object, ...], Tensor] = {}
    gone = {f"{use}.{VALUES}" for use in tied}
    for name, tensor in sorted(model.state_dict().items()):
        if name in gone:
            continue
        layer = layers.get(name.removesuffix(f".{VALUES}")) if name.endswith(f".{VALUES}") else None
        if layer is not None:
            module = name.removesuffix(f".{VALUES}")
            state.update(_layer_tensors(module, layer, tuple(tensor.shape), dtype))
            if module in shared:
                del state[f"{module}.{INPUT_FACTOR}"]
            continue
        key = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
        if key not in cast or not tensor.numel():
            found = _cast(tensor, dtypes.get(name, dtype), name=name)
            cast[key] = found if scratch is None or found is tensor else scratch.keep(found)
        state[name] = cast[key]
    return state


def _with_quantized(state: dict[str, Tensor], quantized: Mapping[str, QuantizedLinear]) -> dict[str, Tensor]:
    """The tensors with those of quantised layers in the place of their weights, in the order of their names."""
    gone = {f"{name}.{VALUES}" for name in quantized}
    kept = {name: tensor for name, tensor in state.items() if name not in gone}
    for name, layer in quantized.items():
        kept |= {f"{name}.{part}": tensor for part, tensor in layer.tensors.items()}
    return dict(sorted(kept.items())) if quantized else kept


def _layer_tensors(name: str, layer: PackedLinear, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
    if layer.shape != shape or layer.dtype != dtype:
        raise CheckpointError(
            f"{name}: packed as {layer.shape} {layer.dtype}, but the model's weight is {shape} and the "
            f"checkpoint is written in {dtype}"
        )
    return {f"{name}.{part}": tensor for part, tensor in named_tensors(layer).items()}


def _cast(tensor: Tensor, dtype: torch.dtype, *, name: str) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    cast = tensor.to(dtype)
    lost = int((cast.isfinite() != tensor.isfinite()).sum())
    if lost:
        raise CheckpointError(f"{name}: {lost} numbers do not fit {dtype}: store this model in bfloat16 or float32")
    return cast


@contextmanager
def _config_for_saving(model: PreTrainedModel, quantization: dict[str, Any] | None) -> Iterator[None]:
    """Lend the model's config a `quantization_config` (or none) while it is saved; saving changes other fields, too."""
    before = dict(model.config.__dict__)
    try:
        if quantization is not None:
            model.config.quantization_config = quantization
        elif "quantization_config" in before:
            del model.config.quantization_config
        yield
    finally:
        model.config.__dict__.clear()
        model.config.__dict__.update(before)


@contextmanager
def _own_names(model: PreTrainedModel, *, wanted: bool) -> Iterator[bool]:
    """Let saving keep the model's own names where that is wanted; yields whether saving goes the way that renames."""
    loaded = vars(model).get(_CONVERSIONS)
    if not wanted or loaded is None:
        yield not wanted
        return
    vars(model)[_CONVERSIONS] = []  # nothing to rename, and the order of tensors in shards that renaming gives
    try:
        yield True
    finally:
        vars(model)[_CONVERSIONS] = loaded


def _without_missing_code(folder: Path) -> None:
    """Take `auto_map` out of JSON files beside config.json whose Python files did not come along."""
    names = {path.name for path in folder.iterdir()}
    for file in sorted(folder.glob("*config.json")):
        try:
            config = read_json(file)
        except CheckpointError:  # it came like that, and names no file
            continue
        kept = without_missing_code(config, names)
        if kept != config and file.name != CONFIG_FILE:
            file.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _finish_config(file: Path, sub_configs: tuple[str, ...], dtype: torch.dtype, base: Mapping[str, Any]) -> None:
    """Correct what transformers writes: the dtype that the model has in memory, where loaders want the one on disk.

    `auto_map` goes: the model was loaded as transformers' own class, and its Python files do not come along. An attention
    implementation that the source's config.json asks for stays, so that a reload runs on it.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("auto_map", None)
    config |= {key: base[key] for key in _NOT_SAVED if key in base}
    for section in (config, *(config[key] for key in sub_configs if isinstance(config.get(key), dict))):
        section["dtype"] = str(dtype).removeprefix("torch.")
    # Exactly as transformers writes it, so that a model which is loaded and saved again has the same file.
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
