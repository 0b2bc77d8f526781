"""What a compressed model brings to a run: the first changes, which put everything as it is stored and change no weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from armor_recipes.checkpoint.compressed import CompressedModel
from armor_recipes.checkpoint.files import read_header
from armor_recipes.checkpoint.quantized import QuantizedLinear
from armor_recipes.checkpoint.reader import read_plain
from armor_recipes.integrations.compressed import packed_layers
from armor_recipes.modifiers.kinds.changes import Changes, ModuleResult
from armor_recipes.modifiers.kinds.module import GIVEN


def given_changes(source: CompressedModel, stored: torch.dtype, *, packed: bool) -> Changes:
    """Factors and plain quantised layers as they are stored, with a result for each: no loss, since it is the model's own weight.

    With `packed` false (a dense output) plain layers are dense from here on. Raises CheckpointError where a layer is damaged.
    """
    factors = dict(packed_layers(source, stored))
    tensors = read_header(source.folder)
    kept = source.kept if packed else {}
    return Changes(
        step=GIVEN,
        factors=factors,
        quantized={name: read_plain(name, scheme, tensors) for name, scheme in kept.items()},
        packed=packed,
        sharing={name: spec.input_factor or name for name, spec in source.layers.items()},
        modules={name: _result(name) for name in (*factors, *kept)},
    )


def _result(name: str) -> ModuleResult:
    return ModuleResult(
        name=name,
        modifier=GIVEN,
        losses=(0.0,),
        stored_loss=0.0,
        error=0.0,
        tokens=0,
        iterations=0,
        stop_reason="as it was in the model",
        counts={},
        seconds=0.0,
    )


@contextmanager
def run_as_stored(model: nn.Module, layers: Mapping[str, QuantizedLinear]) -> Iterator[None]:
    """Let activations of plain quantised layers be quantised meanwhile, as when the model is loaded."""
    handles = []
    for name, layer in layers.items():
        module = model.get_submodule(name)
        quantizer = layer.activations(module.get_parameter("weight").dtype)
        before, after = (None, None) if quantizer is None else quantizer.hooks
        handles += [] if before is None else [module.register_forward_pre_hook(before)]
        handles += [] if after is None else [module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
