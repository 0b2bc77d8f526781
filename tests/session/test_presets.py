"""Sets of modules by what they are for, and layers that are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from armor_recipes.errors import PlanError, RecipeError
from armor_recipes.model.blocks import find_stacks
from armor_recipes.model.forms import linearise
from armor_recipes.plan.targets import Tree, resolve_targets
from armor_recipes.recipe.schema import ModifierConfig
from armor_recipes.run.job import read_recipe
from tests.support.engine import recipe

SIZES: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
FEED: dict[str, Any] = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2}
KINDS: dict[str, tuple[type[nn.Module], Any, dict[str, set[str]]]] = {
    "llama": (
        LlamaForCausalLM,
        LlamaConfig(**FEED),
        {"attention": {"q_proj", "k_proj", "v_proj", "o_proj"}, "mlp": {"gate_proj", "up_proj", "down_proj"}},
    ),
    "opt": (
        OPTForCausalLM,
        OPTConfig(**SIZES, ffn_dim=32, word_embed_proj_dim=16),
        {"attention": {"q_proj", "k_proj", "v_proj", "out_proj"}, "mlp": {"fc1", "fc2"}},
    ),
    "gpt2": (
        GPT2LMHeadModel,
        GPT2Config(vocab_size=32, n_embd=16, n_layer=4, n_head=2),
        {"attention": {"attn.c_attn", "attn.c_proj"}, "mlp": {"mlp.c_fc", "mlp.c_proj"}},
    ),
    "bert": (
        BertForMaskedLM,
        BertConfig(**SIZES, intermediate_size=32),
        {
            "attention": {"query", "key", "value", "attention.output.dense"},
            "mlp": {"intermediate.dense", "0.output.dense", "1.output.dense", "2.output.dense", "3.output.dense"},
        },
    ),
    "t5": (
        T5ForConditionalGeneration,
        T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=4, num_heads=2),
        {"attention": {".q", ".k", ".v", ".o"}, "mlp": {".wi", ".wo"}},
    ),
    "mixtral": (
        MixtralForCausalLM,
        MixtralConfig(**FEED, num_local_experts=4),
        {"attention": {"q_proj", "k_proj", "v_proj", "o_proj"}, "mlp": {"gate_proj", "up_proj", "down_proj"}},
    ),
    "qwen2-moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(**FEED, num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16),
        {"attention": {"q_proj", "k_proj", "v_proj", "o_proj"}, "mlp": {"gate_proj", "up_proj", "down_proj"}},
    ),
    "jamba": (
        JambaForCausalLM,
        JambaConfig(**FEED, num_experts=2, use_mamba_kernels=False, attn_layer_period=2, attn_layer_offset=1),
        {
            "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
            "mlp": {"gate_proj", "up_proj", "down_proj"},
            "other": {"in_proj", "x_proj", "dt_proj", "out_proj"},
        },
    ),
}


def tree(kind: str) -> Tree:
    made: Any
    made, config, _ = KINDS[kind]
    with torch.device("meta"):
        model = made(config)
    linearise(model)
    return Tree([(n, m) for n, m in model.named_modules(remove_duplicate=False) if n], find_stacks(model))


def names(found: Tree, **fields: Any) -> tuple[str, ...]:
    return resolve_targets(found, ModifierConfig(**fields)).names


@pytest.mark.parametrize("kind", KINDS)
def test_presets_are_what_modules_are_for(kind: str) -> None:
    found, wanted = tree(kind), KINDS[kind][2]
    every: set[str] = set()
    for role in ("attention", "mlp"):
        matched = names(found, targets=(f"preset:{role}",))
        assert all(any(name.endswith(tail) for tail in wanted[role]) for name in matched), matched
        assert all(any(name.endswith(tail) for name in matched) for tail in wanted[role]), matched
        assert not every & set(matched)
        every |= set(matched)
    others = set(names(found, targets=("preset:all-linear",))) - every
    assert {name.rpartition(".")[2] for name in others} == wanted.get("other", set())
    assert names(found, targets=("preset:all-linear",), ignore="preset:mlp") == tuple(
        name
        for name in names(found, targets=("preset:all-linear",))
        if name not in names(found, targets=("preset:mlp",))
    )


@pytest.mark.parametrize(("first", "last", "left"), [(0, 0, {0, 1, 2, 3}), (1, 0, {1, 2, 3}), (1, 2, {1}), (0, 3, {0})])
def test_first_and_last_layers_are_left_alone_in_each_list(first: int, last: int, left: set[int]) -> None:
    taken = names(tree("llama"), targets=("Linear",), skip_layers={"first": first, "last": last})
    assert {int(name.split(".")[2]) for name in taken if "layers" in name} == left
    assert "lm_head" in taken
    both = names(tree("t5"), targets=("preset:mlp",), skip_layers={"first": first, "last": last})
    for stack in ("encoder", "decoder"):
        assert {int(name.split(".")[2]) for name in both if name.startswith(stack)} == left


def test_what_leaves_nothing_is_told() -> None:
    with pytest.raises(PlanError, match=r"`skip_layers` holds back all 12 modules"):
        names(tree("llama"), targets=("preset:mlp",), skip_layers={"first": 4})
    with pytest.raises(PlanError, match=r"'preset:mlp' finds no linear module in repeated layers"):
        resolve_targets(
            Tree([("head", nn.Linear(4, 4))], find_stacks(nn.Sequential())), ModifierConfig(targets=("preset:mlp",))
        )


def test_a_preset_that_is_none_is_told() -> None:
    data = recipe("model", MagnitudeModifier={"targets": ["preset:everything"]})
    with pytest.raises(RecipeError, match="preset:attention, preset:mlp, preset:all-linear"):
        read_recipe(data)
