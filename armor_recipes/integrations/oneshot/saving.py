"""Saving a model whose linear layers are ARMOR cores: every way gives a folder with the factors, or an error.

Without it `save_pretrained` would write S in the place of Ŵ, which any loader takes for a model (measured: perplexity 3,000).
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from armor_recipes.checkpoint.config import VALUES
from armor_recipes.checkpoint.files import CONFIG_FILE, read_config
from armor_recipes.checkpoint.writer import write_checkpoint
from armor_recipes.compute import plain_torch
from armor_recipes.errors import CheckpointError
from armor_recipes.integrations.oneshot.cores import is_core, is_quantized_plain, packed_layer, plain_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAVE = "save_pretrained"
_STALE = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.bin.index.json", CONFIG_FILE)
#: Options of transformers' `save_pretrained` that change nothing here.
_HARMLESS = {"safe_serialization": True, "push_to_hub": False, "is_main_process": True}
_BIAS = "bias"
_mode: ContextVar[Literal["refuse", "packed", "dense"]] = ContextVar("_mode", default="refuse")


def guard(model: PreTrainedModel) -> None:
    """Give a model with cores a `save_pretrained` of its own, and let `state_dict` give nothing that is no whole model."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and not getattr(module, "armor_guarded", False):
            module.register_state_dict_post_hook(_state_of_linear)
            module.armor_guarded = True  # type: ignore[assignment]
    vars(model)[SAVE] = MethodType(save_pretrained, model)


@plain_torch()
def save_pretrained(
    model: PreTrainedModel,
    save_directory: str | Path,
    quantization_format: str | None = None,
    save_compressed: bool = True,
    max_shard_size: int | str = "20GB",
    **others: Any,
) -> None:
    """Write the model with its factors, as `armor-apply` writes it; with `save_compressed=False` dense, for stock loaders.

    What is in the folder stays, but for weights and config.json. Raises CheckpointError where a layer cannot be stored, or for
    options that are not known here; nothing is written then.
    """
    asked = {key for key, value in others.items() if value is not None and _HARMLESS.get(key) is not value}
    if quantization_format is not None:
        asked.add("quantization_format")
    if asked:
        raise CheckpointError(
            f"save_pretrained of a model with ARMOR layers does not know {', '.join(sorted(asked))}: leave it out"
        )
    target = Path(save_directory)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as made:
        folder = Path(made)
        _write(model, folder, packed=save_compressed, shards=max_shard_size)
        _write_recipe(model, folder)
        _put(folder, target)


save_pretrained._overridden = True  # type: ignore[attr-defined] # llm-compressor's word for one that it leaves alone


def _write(model: PreTrainedModel, folder: Path, *, packed: bool, shards: int | str) -> None:
    cores = {name: module for name, module in model.named_modules() if is_core(module)}
    dtypes = {module.weight.dtype for module in cores.values()}
    if len(dtypes) > 1:
        raise CheckpointError(f"ARMOR layers of several dtypes ({sorted(map(str, dtypes))}): give the model one dtype")
    layers = {name: packed_layer(name, module) for name, module in cores.items()}
    plain = {name: plain_layer(name, m) for name, m in model.named_modules() if packed and is_quantized_plain(m)}
    with _saving("packed" if packed else "dense"), _stock_saving(model):
        kept = {name: tensor.dtype for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        write_checkpoint(
            model,
            layers if packed else {},
            folder,
            dtype=dtypes.pop(),
            quantized=plain,
            dtypes=kept,
            base_config=_source_config(model),
            max_shard_bytes=shards,  # type: ignore[arg-type] # transformers reads "20GB", too
        )


@contextmanager
def _saving(mode: Literal["packed", "dense"]) -> Iterator[None]:
    token = _mode.set(mode)
    try:
        yield
    finally:
        _mode.reset(token)


@contextmanager
def _stock_saving(model: PreTrainedModel) -> Iterator[None]:
    """Let `model.save_pretrained` be transformers' own meanwhile."""
    own = vars(model).pop(SAVE)
    try:
        yield
    finally:
        vars(model)[SAVE] = own


@torch.no_grad()
def _state_of_linear(module: nn.Module, state: dict[str, Tensor], prefix: str, _metadata: Any) -> None:
    """A linear layer's entries of a `state_dict`: its weight and bias for our own writer; of a core an error for anybody else."""
    mode, core = _mode.get(), is_core(module)
    if mode == "refuse" and core:
        raise CheckpointError(
            f"{prefix.removesuffix('.')} is an ARMOR layer, whose weight is a core without its factors here: saved alone, it would "
            "load as garbage; call model.save_pretrained(folder), which stores all of them (or with save_compressed=False a "
            "dense model)"
        )
    if mode == "refuse" or not (core or is_quantized_plain(module)):
        return
    for name in [key for key in state if key.startswith(prefix)]:
        if name.removeprefix(prefix) not in (VALUES, _BIAS):
            del state[name]
    if mode == "dense":
        weight, name = state[f"{prefix}{VALUES}"], prefix.removesuffix(".")
        dense = (
            packed_layer(name, module).fold(weight.dtype)
            if core
            else plain_layer(name, module).dequantize(weight.dtype)
        )
        state[f"{prefix}{VALUES}"] = dense


def _source_config(model: PreTrainedModel) -> dict[str, Any]:
    folder = Path(model.name_or_path or "")
    return read_config(folder) if (folder / CONFIG_FILE).is_file() else {}


def _write_recipe(model: PreTrainedModel, folder: Path) -> None:
    """What llm-compressor writes beside a model that it has changed, where it has one in this process."""
    if "llmcompressor" not in sys.modules:
        return
    from llmcompressor.transformers.compression.compressed_tensors_utils import update_and_save_recipe

    update_and_save_recipe(model.name_or_path, str(folder))


def _put(folder: Path, target: Path) -> None:
    """Move files into a folder in the place of an older model's, config.json last."""
    target.mkdir(exist_ok=True)
    for pattern in _STALE:
        for old in target.glob(pattern):
            old.unlink()
    for file in sorted(folder.iterdir(), key=lambda file: (file.name == CONFIG_FILE, file.name)):
        file.replace(target / file.name)
