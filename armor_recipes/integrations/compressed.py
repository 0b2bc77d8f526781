"""Load a compressed model as a recipe changes it: linear layers with the weights that their factors or integers give."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from armor_recipes.checkpoint.compressed import CompressedModel
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.reader import read_layers
from armor_recipes.integrations.dense import forget_quantization
from armor_recipes.integrations.plain import dequantized, forget_dequantized
from armor_recipes.integrations.transformers import ArmorCompressor, load
from armor_recipes.runtime.linear import ArmorLinear


def load_compressed(
    source: CompressedModel, *, dtype: torch.dtype, stored: torch.dtype, device: Any
) -> PreTrainedModel:
    """The model in `dtype` on `device`, in evaluation mode, every layer an `nn.Linear`; linear forms stay as they were packed.

    Weights of ARMOR layers are what a loader computing in `dtype` makes of the factors in the dtype `stored`, bit for bit.

    Raises:
        CheckpointError: where the folder is not what its format promises.
    """
    model = load(source.folder, backend="folded", dtype=dtype, device=device)
    weights = {name: packed.to(dtype).fold(dtype) for name, packed in packed_layers(source, stored)}
    for name, module in list(model.named_modules()):
        dense = dequantized(module)
        if isinstance(module, ArmorLinear):
            ArmorCompressor.decompress_module(module, leave_decompressed=False)
            module.weight = _parameter(weights[name].to(module.weight.device))
        elif dense is not None and isinstance(module, nn.Linear):
            forget_dequantized(module)
            module.weight = _parameter(dense)
    forget_quantization(model)
    return model


def packed_layers(source: CompressedModel, stored: torch.dtype) -> Iterable[tuple[str, PackedLinear]]:
    """The ARMOR layers by name, their floats in `stored`. Layers that share a B hold the same tensor."""
    if not source.layers:
        return
    inputs: dict[int, tuple[Tensor, Tensor]] = {}
    for name, layer in read_layers(source.folder).items():
        packed = layer.to(stored)
        b = inputs.setdefault(id(layer.b), (layer.b, packed.b))[1]
        packed = PackedLinear(packed.values, packed.bitmask, packed.a, b, packed.scale, packed.activations)
        packed.validate(name=name)
        yield name, packed


def _parameter(weight: Tensor) -> nn.Parameter:
    return nn.Parameter(weight.detach().clone())
