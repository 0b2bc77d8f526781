"""Which modules are decoder layers."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

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


def test_an_encoder_stands_before_the_decoder() -> None:
    model = T5ForConditionalGeneration(T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4))
    found = find_stacks(model)
    assert [(stack.name, stack.first) for stack in found.all] == [("encoder.block", 0), ("decoder.block", 2)]
    assert found.block_of("decoder.block.1.layer.0.SelfAttention.q") == 3
    assert found.of_block(3).block_name(3) == found.block_name(3) == "decoder.block.1"
    assert found.block(3) is model.get_submodule("decoder.block.1")


def test_a_linear_module_outside_of_all_lists_is_a_stack_of_its_own() -> None:
    model = make_model("llama")
    found = find_stacks(model)
    assert [(stack.names, stack.first) for stack in found.outside] == [(("lm_head",), 2)]
    assert found.block_of("lm_head") == 2
    assert found.block(2) is model.lm_head
    assert found.names_to(1) == found.names
    assert found.names_to(2) == (*found.names, "lm_head")


def test_matrices_without_a_list_are_stacks_of_their_own() -> None:
    found = find_stacks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    assert found.all == ()
    assert [stack.names for stack in found.outside] == [("0",), ("2",)]


def test_a_module_at_two_places_has_one_number() -> None:
    model = nn.Module()
    model.first = model.second = nn.Linear(4, 4)
    assert [stack.name for stack in find_stacks(model).outside] == ["first"]


def test_blocks_count_whatever_their_matrices_are() -> None:
    """So that making some of them linear leaves all numbers as they are."""
    model = nn.Module()
    model.embeddings = nn.ModuleList(nn.Embedding(9, 4) for _ in range(2))
    model.convolutions = nn.ModuleList(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()) for _ in range(2))
    model.fused = nn.ModuleList(nn.ParameterDict({"experts": nn.Parameter(torch.zeros(2, 4, 4))}) for _ in range(2))
    model.blocks = nn.Sequential(OrderedDict(first=nn.Sequential(nn.Linear(4, 4)), last=nn.Sequential(nn.Linear(4, 4))))
    found = find_stacks(model)
    assert found.names == ("fused.0", "fused.1", "blocks.first", "blocks.last")
    assert found.outside == ()


def test_stages_that_are_lists_are_stacks_of_their_own() -> None:
    """PVT's and Florence-2's: no pass ever calls a list of blocks."""
    model = nn.Module()
    model.stages = nn.ModuleList(
        nn.ModuleList(nn.Sequential(nn.Linear(4, 4)) for _ in range(blocks)) for blocks in (2, 1)
    )
    found = find_stacks(model)
    assert [(stack.name, stack.first) for stack in found.all] == [("stages.0", 0), ("stages.1", 2)]
    assert found.names == ("stages.0.0", "stages.0.1", "stages.1.0")


def test_a_place_in_a_list_may_be_empty() -> None:
    """Informer's last convolution."""
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)), None])
    assert find_stacks(model).names == ("layers.0",)


def test_lists_of_single_matrices_are_no_stacks() -> None:
    model = nn.Module()
    model.small = nn.ModuleList(nn.Linear(4, 4) for _ in range(9))
    model.layers = nn.ModuleList(nn.Sequential(nn.Linear(32, 32)) for _ in range(2))
    model.mixed = nn.ModuleList([nn.Linear(99, 99), nn.ReLU()])
    assert find_stacks(model).names == ("layers.0", "layers.1")
    assert [stack.name for stack in find_stacks(model).outside][-2:] == ["small.8", "mixed.0"]


def test_layer_of_does_not_take_a_prefix_for_the_name() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(12))
    layers = find_stacks(model)
    assert layers.block_of("layers.11.mlp") == 11
    assert layers.block_of("layers.1.mlp") == 1
    assert layers.block_of("layers") is None
    assert layers.block_of("lm_head") is None
