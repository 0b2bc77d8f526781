"""Llama models in OpenVINO's form: traced from transformers' layers, keys and values in the model's state."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

FILE = "model.xml"
GROUP = 64  # columns of a scale in int4, as in our own rows


class Stateless(nn.Module):
    """The layers of a Llama with keys and values of past tokens as inputs, and those of all tokens as outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._model = model

    def forward(self, ids: Tensor, beams: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Logits of the last token `(batch, vocabulary)`, then keys and values `(batch, heads, tokens, d)` of each layer.

        `beams` `(batch,)` says whose past each sequence goes on from: only with it OpenVINO sees what to fuse.
        """
        body = self._model.model
        seen = past[0].shape[2]
        positions = torch.arange(seen, seen + ids.shape[1]).unsqueeze(0)
        mask = torch.arange(seen + ids.shape[1])[None, None, None, :] <= positions[:, None, :, None]
        cache = Past([tensor.index_select(0, beams) for tensor in past])
        hidden = body.embed_tokens(ids)
        rotary = body.rotary_emb(hidden, position_ids=positions)
        for layer in body.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary, cache=cache)
        return self._model.lm_head(body.norm(hidden[:, -1])), *cache.tensors


class Past:
    """What an attention layer needs of a cache."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = list(tensors)

    def update(self, keys: Tensor, values: Tensor, layer: int, **_: Any) -> tuple[Tensor, Tensor]:
        """Add a layer's new keys and values; returns all."""
        for i, new in enumerate((keys, values), 2 * layer):
            self.tensors[i] = torch.cat([self.tensors[i], new], dim=2)
        return self.tensors[2 * layer], self.tensors[2 * layer + 1]


def write_openvino(dense: Path, folder: Path, form: str) -> None:
    """Write the Llama folder `dense` into the existing empty folder `folder`.

    Args:
        dense: a folder that transformers loads as `LlamaForCausalLM`.
        folder: gets the graph, FILE, and its weights.
        form: `f16`, or `int8` or `int4` by NNCF without data, which leaves embeddings and head in 8 bits.
    """
    import openvino  # an optional rival's
    from openvino._offline_transformations import apply_make_stateful_transformation

    model = AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()
    config = model.config
    empty = torch.zeros(2, config.num_key_value_heads, 2, config.head_dim)
    example = (torch.ones(2, 2, dtype=torch.long), torch.arange(2), *[empty] * (2 * config.num_hidden_layers))
    with torch.no_grad():
        converted = openvino.convert_model(Stateless(model), example_input=example)
    ids, beams, *past = converted.inputs
    for entry, name, shape in ((ids, "ids", [-1, -1]), (beams, "beams", [-1])):
        entry.tensor.set_names({name})
        entry.get_node().set_partial_shape(openvino.PartialShape(shape))
    state = {}
    for i, (entry, out) in enumerate(zip(past, converted.outputs[1:], strict=True)):
        entry.tensor.set_names({f"past{i}"})
        out.tensor.set_names({f"present{i}"})
        entry.get_node().set_partial_shape(openvino.PartialShape([-1, config.num_key_value_heads, -1, config.head_dim]))
        state[f"past{i}"] = f"present{i}"
    converted.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(converted, state)
    _begin_empty(converted)
    openvino.save_model(_compressed(converted, form), folder / FILE, compress_to_fp16=form == "f16")


def _begin_empty(model: Any) -> None:
    """A state begins with no tokens for each sequence; without this with no sequence."""
    from openvino import opset13 as ops

    batch = ops.gather(ops.shape_of(model.input("ids"), output_type="i64"), ops.constant([0]), ops.constant(0))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            _, heads, _, width = (dim.get_min_length() for dim in node.get_output_partial_shape(0))
            shape = ops.concat([batch, ops.constant(np.array([heads, 0, width]))], axis=0)
            node.set_arguments([ops.broadcast(ops.constant(0.0, dtype=node.get_output_element_type(0)), shape)])
    model.validate_nodes_and_infer_types()


def _compressed(model: Any, form: str) -> Any:
    if form == "f16":
        return model
    import nncf  # an optional rival's

    if form == "int8":
        return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT4_SYM, group_size=GROUP)
