"""Write a model as a Hugging Face folder, its ARMOR layers packed. Equal inputs give equal bytes."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from armor_recipes.checkpoint.config import INPUT_FACTOR, VALUES, named_tensors, quantization_config
from armor_recipes.checkpoint.files import CONFIG_FILE, read_header, read_tensor
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.reader import check_folder
from armor_recipes.errors import CheckpointError, PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_SHARD_BYTES = 5_000_000_000
_DECODER_LAYER = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")


def write_checkpoint(
    model: PreTrainedModel,
    layers: Mapping[str, PackedLinear],
    destination: Path,
    *,
    dtype: torch.dtype,
    tokenizer: PreTrainedTokenizerBase | None = None,
    files: Mapping[str, bytes] | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write `model` into the existing folder `destination`; the model itself is left as it was.

    Args:
        model: in memory, in any float dtype. The weights of the modules named in `layers` are not written.
        layers: full module name → what is written in place of that module's weight. Empty: a plain dense model, without
            `quantization_config`, as every stock loader reads it.
        destination: an empty folder, see `armor_recipes.checkpoint.staging`.
        dtype: of every float tensor on disk; the layers must be packed in it.
        tokenizer: saved beside the model.
        files: further files, name → content.
        max_shard_bytes: larger models are split into several files.

    Raises:
        PlanError: if a layer is no linear layer of the model, or shares its weight.
        CheckpointError: if a number does not fit `dtype`, or a layer was packed in another.
    """
    check_layers(model, layers)
    shared = shared_input_factors({name: layers[name] for name, _ in model.named_modules() if name in layers})
    config = quantization_config(layers, _dense_linears(model, layers), shared) if layers else None
    state = _state_dict(model, layers, dtype, shared)
    with _config_for_saving(model, config):
        model.save_pretrained(destination, state_dict=state, max_shard_size=max_shard_bytes)
    _set_stored_dtype(destination / CONFIG_FILE, tuple(model.config.sub_configs), dtype)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(destination))
    for name, content in sorted((files or {}).items()):
        (destination / name).write_bytes(content)
    check_folder(destination)


def check_layers(model: PreTrainedModel, layers: Mapping[str, object]) -> None:
    """Check that these modules can be written as ARMOR layers. Raises `PlanError` naming the module and the reason."""
    modules = dict(model.named_modules())
    classes = {base.__name__ for module in modules.values() for base in type(module).__mro__}
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    for name in layers:
        parameter = getattr(modules.get(name), VALUES, None)
        if isinstance(parameter, Tensor) and parameter.dim() == 3:
            raise PlanError(
                f"{name} holds expert weights {tuple(parameter.shape)}; there is no layout for them: write dense"
            )
        if not isinstance(modules.get(name), nn.Linear):
            raise PlanError(f"{name}: no linear layer of {type(model).__name__} has this name")
        if f"{name}.{VALUES}" in tied:
            raise PlanError(f"{name} shares its weight with another module: it cannot be packed, add it to `ignore`")
        if name in classes:
            raise PlanError(f"{name} is also the name of a class in this model: a config group could not name it alone")


def shared_input_factors(layers: Mapping[str, PackedLinear]) -> dict[str, str]:
    """Map each layer whose B another one has, byte for byte → the first such layer in the order given.

    Only layers of one decoder layer (whose names are equal up to the first number) share that are of one config group: of
    one block size, core type and group size.
    """
    owners: dict[tuple[object, ...], list[str]] = defaultdict(list)
    shared = {}
    for name, layer in layers.items():
        decoder_layer = _DECODER_LAYER.match(name)
        if decoder_layer is None:
            continue
        kind = layer.block_size, layer.core, layer.group_size
        group = owners[decoder_layer[0], kind, layer.b.shape, layer.b.dtype]
        owner = next((other for other in group if _equal_bytes(layers[other].b, layer.b)), None)
        if owner is None:
            group.append(name)
        else:
            shared[name] = owner
    return shared


def _equal_bytes(first: Tensor, second: Tensor) -> bool:
    if first is second:
        return True
    return torch.equal(*(tensor.contiguous().view(torch.uint8) for tensor in (first, second)))  # 0.0 and -0.0 differ


def tensor_hashes(folder: Path) -> dict[str, str]:
    """Map tensor name → sha256 (hex) of its bytes, sorted. Raises `CheckpointError` if the folder cannot be read."""
    header = read_header(folder)
    return {name: _sha256(read_tensor(header, name)) for name in header}


def _sha256(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()


def _dense_linears(model: PreTrainedModel, layers: Mapping[str, PackedLinear]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name not in layers]


def _state_dict(
    model: PreTrainedModel, layers: Mapping[str, PackedLinear], dtype: torch.dtype, shared: Mapping[str, str]
) -> dict[str, Tensor]:
    """Collect every tensor to write, by name. What shares memory in the model shares it here, and is written once."""
    state: dict[str, Tensor] = {}
    cast: dict[tuple[object, ...], Tensor] = {}
    for name, tensor in sorted(model.state_dict().items()):
        layer = layers.get(name.removesuffix(f".{VALUES}")) if name.endswith(f".{VALUES}") else None
        if layer is not None:
            module = name.removesuffix(f".{VALUES}")
            state.update(_layer_tensors(module, layer, tuple(tensor.shape), dtype))
            if module in shared:
                del state[f"{module}.{INPUT_FACTOR}"]
            continue
        key = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
        if key not in cast or not tensor.numel():
            cast[key] = _cast(tensor, dtype, name=name)
        state[name] = cast[key]
    return state


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


def _set_stored_dtype(file: Path, sub_configs: tuple[str, ...], dtype: torch.dtype) -> None:
    """Correct the dtype: transformers writes the one that the model has in memory, and loaders want the one on disk."""
    config = json.loads(file.read_text(encoding="utf-8"))
    for section in (config, *(config[key] for key in sub_configs if isinstance(config.get(key), dict))):
        section["dtype"] = str(dtype).removeprefix("torch.")
    # Exactly as transformers writes it, so that a model which is loaded and saved again has the same file.
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
