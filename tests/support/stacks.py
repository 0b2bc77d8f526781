"""Tiny models of many kinds with inputs for them, and sessions on them, for the tests of stacks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

from armor_recipes.calibration.inputs import Batch, InputSet, Source
from armor_recipes.modifiers import modifiers
from armor_recipes.plan import make_plan
from armor_recipes.run.job import read_recipe
from armor_recipes.session import Session
from tests.support.engine import SIZES, recipe

SAMPLES, LENGTH, WRITTEN = 5, 10, 7
_IMAGE, _START, _END = 95, 92, 93
TEXT: dict[str, Any] = {**SIZES, "max_position_embeddings": 64}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
PAIR: dict[str, Any] = {
    "vocab_size": 96,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: t.T5ForConditionalGeneration(
        t.T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ),
    "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(**PAIR, max_position_embeddings=64)),
    "whisper": lambda: t.WhisperForConditionalGeneration(
        t.WhisperConfig(
            **PAIR,
            num_mel_bins=8,
            max_source_positions=16,
            max_target_positions=32,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            decoder_start_token_id=1,
        )
    ),
    "bert": lambda: t.BertModel(t.BertConfig(**TEXT)),
    "albert": lambda: t.AlbertForMaskedLM(t.AlbertConfig(**{**TEXT, "num_hidden_layers": 3}, embedding_size=16)),
    "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**VISION)),
    "clip": lambda: t.CLIPModel(
        t.CLIPConfig(text_config={**TEXT, "eos_token_id": 2}, vision_config=VISION, projection_dim=16)
    ),
    "llava": lambda: t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            vision_config=t.CLIPVisionConfig(**VISION),
            text_config=t.LlamaConfig(**TEXT, num_key_value_heads=4),
            image_token_index=_IMAGE,
            vision_feature_layer=-1,
        )
    ),
    "swin": lambda: t.SwinForImageClassification(
        t.SwinConfig(image_size=16, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    ),
    "zamba2": lambda: t.Zamba2ForCausalLM(
        t.Zamba2Config(
            **{**TEXT, "num_hidden_layers": 4},
            num_key_value_heads=4,
            mamba_d_state=8,
            mamba_ngroups=1,
            mamba_headdim=16,
            n_mamba_heads=4,
            num_mem_blocks=1,
            layers_block_type=["mamba", "hybrid", "mamba", "hybrid"],
            adapter_rank=4,
            attention_head_dim=16,
        )
    ),
    "qwen3-vl": lambda: t.Qwen3VLForConditionalGeneration(
        t.Qwen3VLConfig(
            text_config={
                **TEXT,
                "num_key_value_heads": 4,
                "head_dim": 8,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
            },
            vision_config={
                "depth": 3,
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_heads": 4,
                "patch_size": 4,
                "spatial_merge_size": 2,
                "temporal_patch_size": 1,
                "out_hidden_size": 32,
                "num_position_embeddings": 16,
                "deepstack_visual_indexes": [0, 1],
            },
            image_token_id=_IMAGE,
            video_token_id=91,
            vision_start_token_id=_START,
            vision_end_token_id=_END,
        )
    ),
    "jamba": lambda: t.JambaForCausalLM(
        t.JambaConfig(
            **TEXT,
            num_key_value_heads=4,
            attn_layer_period=2,
            attn_layer_offset=1,
            expert_layer_period=2,
            expert_layer_offset=1,
            num_experts=2,
            mamba_d_state=8,
            mamba_dt_rank=4,
            use_mamba_kernels=False,
        )
    ),
}


def make_stacked(kind: str) -> nn.Module:
    """A random model in float32; the global RNG is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def inputs_for(kind: str) -> dict[str, Tensor]:
    """Named tensors `(5, …)`."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 89, (SAMPLES, LENGTH), generator=generator)
    pixels = torch.randn(SAMPLES, 3, 16, 16, generator=generator)
    written = {"decoder_input_ids": torch.randint(3, 89, (SAMPLES, WRITTEN), generator=generator)}
    if kind in ("vit", "swin"):
        return {"pixel_values": pixels}
    if kind == "whisper":
        return {"input_features": torch.randn(SAMPLES, 8, 32, generator=generator), **written}
    if kind in ("t5", "bart"):
        return {"input_ids": ids, **written}
    if kind == "clip":
        return {"input_ids": ids, "pixel_values": pixels}
    if kind == "llava":
        ids[:, 1:5] = _IMAGE
        return {"input_ids": ids, "pixel_values": pixels}
    if kind == "qwen3-vl":
        ids[:, 1:7] = torch.tensor([_START, *[_IMAGE] * 4, _END])
        patches = torch.randn(SAMPLES, 16, 48, generator=generator)
        grid = torch.tensor([[1, 4, 4]] * SAMPLES)
        return {
            "input_ids": ids,
            "pixel_values": patches,
            "image_grid_thw": grid,
            "mm_token_type_ids": (ids == _IMAGE).long(),
        }
    return {"input_ids": ids}


def input_set(tensors: Batch, *others: Batch) -> InputSet:
    """The tensors as a calibration; others are of other shapes."""
    count = sum(len(next(iter(group.values()))) for group in (tensors, *others))
    source = Source("tensors", 0, 0, 0, count, count)
    return InputSet(dict(tensors), "", count, (source,), (0,) * count, others=others)


def session_on(
    model: nn.Module,
    tensors: Batch,
    *others: Batch,
    batch_size: int = 2,
    **chosen: Mapping[str, Any],
) -> Session:
    """A session of one stage on a model, planned on its own shapes and calibrated on the tensors, `others` of other shapes."""
    mapping = recipe("builtin:stdlib-llama", **chosen)
    mapping["calibration"]["batch_size"] = batch_size
    mapping["output"]["format"] = "dense"
    asked = read_recipe(mapping)
    known = modifiers()
    instances = {entry.key: known[entry.kind](entry.config) for entry in asked.modifiers}
    plan = make_plan(asked, model, instances, itemsize=4)
    specs = {entry.config.calibration for entry in asked.modifiers if entry.config.calibration is not None}
    tokens = dict.fromkeys(specs, input_set(tensors, *others))
    return Session(asked, plan, model, instances, tokens, stored_dtype=torch.float32)
