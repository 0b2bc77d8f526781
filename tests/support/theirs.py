"""Folders as llm-compressor writes them: quantised by compressed-tensors, groups named by class or pattern, 2:4 or not."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from armor_recipes.checkpoint.quantized import QuantizedLinear, Scheme
from armor_recipes.modifiers.scales import weight_scales

SIZES: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
#: Targets of a group → a preset's name, or arguments of its weights.
Groups = Mapping[str, str | Mapping[str, Any]]
INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}


def save(folder: Path, groups: Groups, *, sparse: str = "", ignore: Sequence[str] = ("lm_head",)) -> Path:
    """Write a random Llama of two layers; modules whose name `sparse` finds are 2:4 before they are quantised."""
    dense(folder, sparse=sparse)
    file = folder / "model.safetensors"
    tensors, schemes = load_file(file), {target: _scheme(target, how) for target, how in groups.items()}
    for name in [key.removesuffix(".weight") for key in tensors if "_proj" in key]:
        scheme = next((s for target, s in schemes.items() if _takes(target, name)), None)
        if scheme is not None and name not in ignore:
            weight = tensors.pop(f"{name}.weight")
            made = _compressed(weight, scheme)
            tensors |= {f"{name}.{part}": value for part, value in made.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = _config(schemes, ignore)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def dense(folder: Path, *, sparse: str = "") -> Path:
    """The same model, not quantised."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**SIZES))
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.1)
                if sparse and re.search(sparse, name):
                    module.weight.data *= mask_of(module.weight)
    model.bfloat16().save_pretrained(folder)
    return folder


def mask_of(weight: Tensor) -> Tensor:
    """The two largest of each four in a row."""
    groups = weight.abs().view(-1, 4)
    return torch.zeros_like(groups).scatter_(1, groups.topk(2, dim=1).indices, 1.0).view(weight.shape)


def _takes(target: str, name: str) -> bool:
    return target == "Linear" or target == name or bool(re.match(target.removeprefix("re:"), name))


def _scheme(target: str, how: str | Mapping[str, Any]) -> Any:
    if isinstance(how, str):
        return preset_name_to_scheme(how, [target])
    return QuantizationScheme(targets=[target], weights=dict(how))


def _compressed(weight: Tensor, scheme: Any) -> dict[str, Tensor]:
    state = {"weight": weight, **weight_scales(weight, scheme.weights, None)}
    return dict(QuantizedLinear.compress(Scheme.of(scheme), state).tensors)


def _config(schemes: Mapping[str, Any], ignore: Sequence[str]) -> dict[str, Any]:
    groups = {}
    for number, scheme in enumerate(schemes.values()):
        made = {**scheme.model_dump(mode="json"), "format": Scheme.of(scheme).format}
        groups[f"group_{number}"] = made
    formats = {group["format"] for group in groups.values()}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": list(ignore),
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.19.0",
    }


def logits(model: Any) -> Tensor:
    """Of two fixed rows of tokens."""
    ids = (torch.arange(32) * 7 % SIZES["vocab_size"]).view(2, 16)
    with torch.no_grad():
        found: Tensor = model.eval()(input_ids=ids).logits
    return found
