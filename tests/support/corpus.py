"""The corpus of recipes in llm-compressor's shapes, and a tiny model of the architecture that each of them was written for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedConfig

from tests.support.families import main_class, tiny_config, tiny_model

CORPUS: list[dict[str, str]] = yaml.safe_load((Path(__file__).parents[1] / "recipe" / "corpus.yaml").read_text("utf-8"))
#: What a recipe is for that names no part of a model.
PLAIN = "llama"
#: Sides that the groups and blocks of all presets divide, as those of real models do, and few experts.
SIZES: Mapping[str, int] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "intermediate_size_mlp": 256,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 4,
    "num_local_experts": 4,
}
#: Frequencies in time, height and width of such a head.
ROTARY: Mapping[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [16, 8, 8]}
#: What more it takes, of a part by its name and a dot.
OTHERS: Mapping[str, Mapping[str, Any]] = {
    "whisper": {"d_model": 128, "encoder_ffn_dim": 256, "decoder_ffn_dim": 256},
    "qwen2_vl": {"vision_config.embed_dim": 128, "text_config.rope_parameters": ROTARY},
    "qwen2_5_vl": {"text_config.rope_parameters": ROTARY, "vision_config.out_hidden_size": 128},
    "qwen3_vl": {"text_config.rope_parameters": ROTARY, "vision_config.out_hidden_size": 128},
    "gemma4": {"text_config.hidden_size_per_layer_input": 128},
    "granitemoehybrid": {"mamba_n_heads": 16, "shared_intermediate_size": 128},
    "qwen3_next": {"linear_num_value_heads": 8},
    "qwen3_5_moe": {
        "text_config.linear_num_value_heads": 8,
        "vision_config.out_hidden_size": 128,
        "text_config.rope_parameters": {**ROTARY, "partial_rotary_factor": 0.25, "mrope_section": [4, 2, 2]},
    },
}


#: Whose recipes calibrate more than the text part: they are given random inputs of all kinds.
ALL_INPUTS = (
    "gemma3",
    "idefics3",
    "llava",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5_moe",
    "qwen3_vl",
    "whisper",
)


def dataset_for(name: str) -> str:
    """What recipes for an architecture are calibrated on."""
    return "builtin:random-inputs" if name in ALL_INPUTS else "builtin:random-tokens"


def save_tiny(name: str, folder: Path) -> Path:
    """Write a random bfloat16 model of an architecture, by transformers' name of it."""
    kind = main_class(name)
    assert kind is not None
    sizes = {**dict(_sizes(tiny_config(name))), **OTHERS.get(name, {})}
    tiny_model(kind, tiny_config(name, **sizes)).bfloat16().save_pretrained(folder)
    return folder


def _sizes(config: PreTrainedConfig) -> Iterator[tuple[str, int]]:
    """Those of SIZES that a config has, and its parts, as `part.field`."""
    for prefix, part in ("", config), *((f"{name}.", getattr(config, name)) for name in type(config).sub_configs):
        fields = {} if part is None else vars(part)
        yield from ((prefix + name, size) for name, size in SIZES.items() if isinstance(fields.get(name), int))
