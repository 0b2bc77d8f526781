"""Tiny models, recipes and looks behind the scenes, for the tests of session, modifiers, run and cli."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from armor_recipes.calibration.tokens import build_tokens
from armor_recipes.integrations.models import load_model
from armor_recipes.run import Job, prepare
from armor_recipes.run.job import read_recipe
from armor_recipes.session import Session

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4, tie_word_embeddings=False)),
    "llama-gqa-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)),
    "qwen2-bias": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2)),
    "qwen2-sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SIZES, num_key_value_heads=2, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **{**SIZES, "num_hidden_layers": 3},
            num_key_value_heads=1,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "gpt-neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=96,
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            word_embed_proj_dim=32,
            max_position_embeddings=64,
        )
    ),
}
ALL = r"re:.*(self_attn|mlp)\..*_proj$"
ATTENTION = r"re:.*self_attn\..*_proj$"
MLP = r"re:.*mlp\..*_proj$"
ARMOR: dict[str, Any] = {"targets": [ALL], "block_size": 8, "iterations": 3}


def make_model(kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """A random model whose numbers are those of `dtype`, held in float32; the global RNG is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]()
    model.eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = 0.05 * torch.randn(parameter.shape, generator=generator)
        parameter.data = (parameter.data + noise).to(dtype).float()
    return model


def save_model(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.bfloat16) -> Path:
    """Write such a model as a stock folder in `dtype`."""
    model = make_model(kind, dtype)
    cast: nn.Module = model
    cast.to(dtype)
    model.save_pretrained(folder)
    return folder


def core(num_bits: int = 8, group_size: int | None = None, **fields: Any) -> dict[str, Any]:
    """Fields of `QuantizationModifier` that store a core as integers, a scale for each row or for groups of dense columns."""
    weights = {"num_bits": num_bits, **({"group_size": group_size} if group_size else {"strategy": "channel"})}
    return {"config_groups": {"core": {"weights": weights}}, **fields}


def recipe(model: Path | str, output: Path | str = "out", **modifiers: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe of one stage, by default ARMOR everywhere; `modifiers` are name → fields, `@` written as `__`."""
    group = {name.replace("__", "@"): dict(fields) for name, fields in modifiers.items()} or {"ARMORModifier": ARMOR}
    return {
        "model": str(model),
        "calibration": {
            "dataset": "builtin:random-tokens",
            "samples": 5,
            "sequence_length": 12,
            "batch_size": 2,
        },
        "prune_stage": {"armor_modifiers": group},
        "output": {"path": str(output)},
    }


def make_job(mapping: Mapping[str, Any]) -> Job:
    """Plan a recipe."""
    return prepare(read_recipe(mapping))


def make_session(job: Job, model: PreTrainedModel | None = None, **options: Any) -> Session:
    """A session on the job's model, loaded from its folder unless one is given."""
    loaded = load_model(job.source, device=job.device) if model is None else model
    specs = {e.config.calibration for e in job.recipe.modifiers if e.config.calibration is not None}
    tokens = {spec: build_tokens(spec, tokenizer=None, vocab_size=SIZES["vocab_size"]) for spec in specs}
    return Session(job.recipe, job.plan, loaded, job.modifiers, tokens, stored_dtype=job.source.stored_dtype, **options)


def hook_count(model: nn.Module) -> int:
    """Forward hooks of any kind on all modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def inputs_of(model: nn.Module, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Inputs of these modules in a plain forward pass over all `ids`: `(N·L, I)` by name."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: seen[name].append(args[0].detach().flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for batch in ids.split(2):
            model(input_ids=batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in seen.items()}


def second_moments(model: nn.Module, ids: Tensor, names: list[str]) -> dict[str, Tensor]:
    """Mean square of each input channel of these modules in a plain forward pass."""
    return {name: x.double().square().mean(0).float() for name, x in inputs_of(model, ids, names).items()}


def rng_states() -> tuple[object, ...]:
    """States of the global generators of torch, numpy and Python."""
    name, keys, *rest = np.random.get_state()
    return torch.get_rng_state().tolist(), name, np.asarray(keys).tolist(), rest, random.getstate()


def logits(model: nn.Module) -> Tensor:
    """Of two fixed rows of tokens."""
    ids = (torch.arange(32) * 7 % SIZES["vocab_size"]).view(2, 16)
    with torch.no_grad():
        found = model(input_ids=ids).logits
    assert isinstance(found, Tensor)
    return found
