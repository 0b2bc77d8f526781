"""Which modules are decoder layers."""

from __future__ import annotations

import pytest
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from armor_recipes.errors import PlanError
from armor_recipes.model.blocks import find_stacks
from tests.support.engine import MODELS, make_model

PATHS = {"gpt-neox": "gpt_neox.layers", "opt": "model.decoder.layers"}


@pytest.mark.parametrize("kind", MODELS)
def test_the_layers_are_found_in_order(kind: str) -> None:
    model = make_model(kind)
    layers = find_stacks(model)
    path = PATHS.get(kind, "model.layers")
    assert layers.names == tuple(f"{path}.{i}" for i in range(model.config.num_hidden_layers))
    assert all(
        model.get_submodule(name) is module for name, module in zip(layers.names, layers.all[0].modules, strict=True)
    )


def test_an_encoder_and_a_decoder_are_refused() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    with pytest.raises(PlanError, match=r"encoder\.block, decoder\.block"):
        find_stacks(model)


def test_a_model_without_a_list_is_refused() -> None:
    with pytest.raises(PlanError, match="found none"):
        find_stacks(nn.Sequential(nn.Linear(4, 4)))


def test_without_a_hint_the_largest_list_of_equals_is_taken() -> None:
    model = nn.Module()
    model.small = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32)) for _ in range(2))
    model.mixed = nn.ModuleList([nn.Linear(99, 99), nn.ReLU()])
    assert find_stacks(model).names == ("layers.0", "layers.1")


def test_layer_of_does_not_take_a_prefix_for_the_name() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))
    layers = find_stacks(model)
    assert layers.block_of("layers.11.mlp") == 11
    assert layers.block_of("layers.1.mlp") == 1
    assert layers.block_of("layers") is None
    assert layers.block_of("lm_head") is None
