"""A small generated model, and a packed one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import armor_recipes


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, without a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny-llama")
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)  # type: ignore[no-untyped-call, unused-ignore]
    return folder


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What recipes of the pages go on from: the embedded model with cores and factors, as they start."""
    modifier = {"targets": "preset:all-linear", "block_size": 32, "iterations": 0, "propagate": "dense"}
    recipe = {
        "model": "builtin:stdlib-llama",
        "calibration": {"dataset": "builtin:random-tokens", "samples": 1, "sequence_length": 16},
        "prune_stage": {"armor_modifiers": {"ARMORModifier": modifier}},
        "output": {"path": str(tmp_path_factory.mktemp("packed") / "out")},
    }
    return armor_recipes.apply(recipe).output
