"""Layers that hold several projections in their rows: found by shapes; blocks respect the parts where a server asks for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    MptConfig,
    MptForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
)

from armor_recipes.errors import PlanError
from armor_recipes.model.facts import model_facts
from armor_recipes.model.fused import fused_layers
from armor_recipes.model.linears import find_linears
from tests.support.engine import ARMOR, SIZES, make_job, recipe

QKV, GATE_UP = "model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.gate_up_proj"
FUSED = {"targets": [r"re:.*(qkv|gate_up)_proj$"]}


def build(kind: type[nn.Module], config: Any) -> nn.Module:
    with torch.device("meta"):
        return kind(config)


@pytest.fixture(scope="module")
def phi3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 heads of 8, 2 key-value heads: qkv_proj 64x32 = 32 + 16 + 16; gate_up_proj 96x32 = 2 x 48."""
    folder = tmp_path_factory.mktemp("phi3")
    config = Phi3Config(**{**SIZES, "intermediate_size": 48}, num_key_value_heads=2, pad_token_id=0)
    Phi3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "config", "expected"),
    [
        (
            Phi3ForCausalLM,
            Phi3Config(**SIZES, num_key_value_heads=2, pad_token_id=0),
            {"qkv_proj": (32, 16, 16), "gate_up_proj": (64, 64)},
        ),
        (MptForCausalLM, MptConfig(d_model=32, n_heads=4, n_layers=1, vocab_size=96), {"Wqkv": (32, 32, 32)}),
        (
            ModernBertModel,
            ModernBertConfig(**{**SIZES, "intermediate_size": 48}, pad_token_id=0),
            {"Wqkv": (32, 32, 32), "Wi": (48, 48)},
        ),
        (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES), {}),
        (
            FalconForCausalLM,
            FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4),
            {},
        ),
        (LlamaForCausalLM, LlamaConfig(**SIZES), {}),
    ],
    ids=["phi3", "mpt", "modernbert", "gpt-neox", "falcon", "llama"],
)
def test_parts_are_found_by_shapes(kind: type[nn.Module], config: Any, expected: dict[str, tuple[int, ...]]) -> None:
    model = build(kind, config)
    found = fused_layers(find_linears(model), model_facts(model))
    assert {name.rpartition(".")[2]: tuple(rows for _, rows in parts) for name, parts in found.items()} == expected


def serve(model: Path, *ways: int, **modifiers: Any) -> Any:
    return make_job({**recipe(model, **modifiers), "serve": {"tensor_parallel": list(ways)}})


@pytest.mark.parametrize(("block", "ways", "fits"), [(16, 1, True), (8, 2, True), (8, 4, False), (4, 4, True)])
def test_a_server_needs_whole_blocks_in_each_part(phi3: Path, block: int, ways: int, fits: bool) -> None:
    job = lambda: serve(phi3, ways, ARMORModifier={**ARMOR, **FUSED, "block_size": block})  # noqa: E731
    if fits:
        assert len(job().plan.modules) == 4
        return
    with pytest.raises(PlanError) as caught:
        job()
    assert f"{GATE_UP} (gate): 48 rows over 4 processes are not whole blocks" in str(caught.value)
    assert "its parts are gate 48 rows, up 48 rows: choose an output block size of [1, 2, 3, 4, 6, 12]" in str(
        caught.value
    )


def test_blocks_across_parts_are_refused_for_a_server_and_noted_else(phi3: Path) -> None:
    modifier = {**ARMOR, **FUSED, "block_size": 32}
    with pytest.raises(PlanError) as caught:
        serve(phi3, 1, ARMORModifier=modifier)
    assert f"{QKV} (key): 16 rows over 1 processes are not whole blocks" in str(caught.value)
    assert "(and 1 more like it: model.layers.1)" in str(caught.value)
    plan = make_job(recipe(phi3, ARMORModifier=modifier)).plan
    assert {row.block_size for row in plan.modules} == {(32, 32)}
    qkv, gate_up = sorted(plan.notes, key=lambda note: GATE_UP in note)
    assert qkv.startswith(
        f"{QKV}: blocks of 32 rows lie in two of its parts (query 32 rows, key 16 rows, value 16 rows)"
    )
    assert "output block sizes that fit are [1, 2, 4, 8, 16] (and 1 more like it: model.layers.1)" in qkv
    assert "(gate 48 rows, up 48 rows)" in gate_up
    assert make_job(recipe(phi3, ARMORModifier={**modifier, "block_size": 16})).plan.notes == ()
