"""Loaded models without packed layers, for what has to read or change a weight itself."""

from __future__ import annotations

from importlib import import_module
from typing import TypeVar

import torch
from torch import nn
from transformers import PreTrainedModel

from armor_recipes.checkpoint.config import SCALE, TENSOR_NAMES
from armor_recipes.compute import plain_torch
from armor_recipes.errors import PlanError
from armor_recipes.integrations.caches import has_cache
from armor_recipes.integrations.rotations import rotation_tensors
from armor_recipes.integrations.transformers import ArmorCompressor
from armor_recipes.integrations.upstream import is_module_quantized
from armor_recipes.model.forms import restore
from armor_recipes.runtime.linear import ArmorLinear

M = TypeVar("M", bound=nn.Module)
_HOOK = "_hf_hook"


@plain_torch()
def to_dense(model: M) -> M:
    """Turn every ARMOR layer of a model, in place, into a plain `nn.Linear` that holds Ŵ in the dtype of its factors.

    The model is an ordinary one then, in the memory of a dense one: adapters can be merged into it, and `save_pretrained` writes a
    folder that every stock loader reads. Experts are fused again, as their architecture has them. peft may have wrapped it, before
    or after: adapters stay, and experts that have some stay apart. Without ARMOR layers nothing changes.

    Args:
        model: a loaded model, or any module that holds one.

    Returns:
        The same model.

    Raises:
        PlanError: if layers are offloaded, or other layers are compressed, too, or keys and values. Nothing was changed.
        CheckpointError: if a layer's tensors break the format.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ArmorLinear)}
    _refuse_offloaded(layers)
    _refuse_others(model, layers)
    tied = {name: other for name, layer in layers.items() if (other := layer.tied_to) is not None}
    with torch.no_grad():
        for name in sorted(layers, key=tied.__contains__):  # stable: those that others are tied to come first
            _make_plain(layers[name])
            if name in tied:
                layers[name].weight = tied[name].weight
        if layers:
            restore(model)
    for part in model.modules() if layers else ():
        if isinstance(part, PreTrainedModel):
            forget_quantization(part)
    return model


def _refuse_offloaded(layers: dict[str, ArmorLinear]) -> None:
    for name, layer in layers.items():
        if any(parameter.is_meta for parameter in layer.parameters()):
            raise PlanError(
                f"{name} has tensors on the meta device: it was offloaded (device_map, max_memory), so its weight cannot be put in "
                "place; load the model without that, or write a dense folder by `armor export FOLDER OUT --to dense`"
            )


def _refuse_others(model: nn.Module, layers: dict[str, ArmorLinear]) -> None:
    """The configuration must go with the packed layers, and describes all that are compressed."""
    rotated = sorted(rotation_tensors(model)) if layers else []
    if rotated:
        raise PlanError(f"{rotated[0]} rotates activations as the model runs, for which a dense folder has no place")
    for name, module in model.named_modules():
        if layers and has_cache(module):
            raise PlanError(
                f"keys and values of {name} are quantised (kv_cache_scheme), for which a dense folder has no place"
            )
        if name not in layers and is_module_quantized(module):
            raise PlanError(
                f"{name} ({type(module).__name__}) is compressed, and no ARMOR layer: a model of both cannot be made dense in part"
            )


def _make_plain(layer: ArmorLinear) -> None:
    hook = getattr(layer, _HOOK, None)
    if hook is not None:  # accelerate's: it holds on to the forward of the layer's class
        import_module("accelerate.hooks").remove_hook_from_module(layer)
    ArmorCompressor.decompress_module(layer, leave_decompressed=False)
    if hook is not None:
        import_module("accelerate.hooks").add_hook_to_module(layer, hook)


def forget_quantization(model: PreTrainedModel) -> None:
    """What a stock quantizer sets on a model, so that nothing claims packed layers: saving, casting, adapters, or a Trainer."""
    packed = (*TENSOR_NAMES[1:], SCALE)
    for keys in ("all_tied_weights_keys", "_tied_weights_keys"):
        known = model.__dict__.get(keys)
        if known is not None:
            setattr(model, keys, {n: m for n, m in known.items() if n.rpartition(".")[2] not in packed})
    for name in ("hf_quantizer", "quantization_method", "_weight_conversions"):
        model.__dict__.pop(name, None)
    model.__dict__["is_quantized"] = False
    for name in ("quantization_config", "_is_quantized"):
        model.config.__dict__.pop(name, None)
