"""What a recipe may say of schemes, and what it may not, told with the place in it before a model is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES

import armor_recipes
from armor_recipes.errors import NumericalError, RecipeError, UnfitError
from armor_recipes.modifiers import ModuleShape
from armor_recipes.modifiers.plain import plan_plain
from armor_recipes.modifiers.quantization import QuantizationConfig
from armor_recipes.run.job import read_recipe
from tests.support.engine import MLP, make_model, recipe

PLACE = "prune_stage.armor_modifiers.QuantizationModifier"


def weights(**fields: Any) -> dict[str, Any]:
    return {"config_groups": {"own": {"weights": fields}}}


def group(**fields: Any) -> dict[str, Any]:
    return {"config_groups": {"own": {"weights": {"num_bits": 8}, **fields}}}


REFUSED = [
    (
        weights(strategy="group"),
        "config_groups.own: compressed-tensors refuses it: weights: ",
    ),
    (weights(group_size=0), "config_groups.own: compressed-tensors refuses it: weights: "),
    (weights(group_size=-2), ".config_groups.own.weights.group_size: must be"),
    (weights(strategy="channel", group_size=32), "config_groups.own: compressed-tensors refuses it: weights: "),
    (weights(strategy="attn_head"), "config_groups.own: weights have no heads"),
    (weights(strategy="rows"), ".config_groups.own.weights.strategy: must be 'tensor'"),
    (weights(strategy="block"), "config_groups.own: compressed-tensors refuses it: weights: "),
    (
        weights(strategy="block", block_structure="128"),
        ".block_structure: is not of the form ROWSxCOLUMNS, such as 128x128",
    ),
    (
        weights(strategy="block", block_structure="0x128"),
        ".config_groups.own.weights.block_structure: must be at least 1",
    ),
    (weights(strategy="block", block_structure=[1, 2, 3]), ".config_groups.own.weights.block_structure: "),
    (weights(scale_dtype="float33"), "refuses it: weights.scale_dtype: "),
    (weights(dynamic="local"), "config_groups.own: compressed-tensors refuses it: weights: "),
    (weights(num_bits=3, type="float"), "config_groups.own: compressed-tensors refuses it: "),
    (group(input_activations={"strategy": "channel"}), "config_groups.own: compressed-tensors refuses it: "),
    (
        group(input_activations={"strategy": "token"}),
        "config_groups.own: compressed-tensors refuses it: input_activations: ",
    ),
    (group(format="zip"), "config_groups.own: compressed-tensors refuses it: format: "),
    (group(targets=[]), ".config_groups.own.targets: must not be empty"),
    ({"config_groups": {}}, ".config_groups: must not be empty"),
    ({"scheme": {}}, ".scheme: must not be empty"),
    ({"scheme": {"W4A16": []}}, ".scheme.W4A16: must not be empty"),
    ({"scheme": {"W4A16": 3}}, ".scheme.W4A16: must be a list"),
    ({"scheme": {"W4A16": ["re:("]}}, ".scheme.W4A16.0: is not a regular expression"),
    ({"scheme": "W4A16", "targets": []}, ".targets: must not be empty"),
]


@pytest.mark.parametrize(("fields", "text"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_what_is_no_scheme_is_refused_in_one_line(fields: dict[str, Any], text: str) -> None:
    whole = {
        "model": "builtin:stdlib-llama",
        "calibration": {"dataset": "builtin:pydoc"},
        "prune_stage": {"armor_modifiers": {"QuantizationModifier": fields}},
        "output": {"path": "out"},
    }
    with pytest.raises(RecipeError) as caught:
        read_recipe(whole)
    assert PLACE in str(caught.value)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_words_in_capitals_and_blocks_as_text_are_read_as_compressed_tensors_reads_them() -> None:
    args = {"type": "FLOAT", "strategy": "BLOCK", "block_structure": "64x32"}
    (scheme,) = QuantizationConfig.model_validate(weights(**args)).schemes
    found = scheme.weights
    assert (found.type, found.strategy, found.block_structure) == ("float", "block", [64, 32])
    ordered = QuantizationConfig.model_validate(weights(group_size=32, actorder="Static"))
    assert ordered.schemes[0].weights.actorder == "static"


def test_a_module_named_twice_is_named_once() -> None:
    fields = QuantizationConfig.model_validate({"scheme": {"W4A16": ["Linear", "Linear"], "W8A16": "Linear"}})
    assert fields.targets == ("Linear",)
    assert [scheme.args.weights.num_bits for scheme in fields.matching("model.up")] == [8, 4]


def plan(fields: dict[str, Any], itemsize: int = 2) -> Any:
    scheme = QuantizationConfig.model_validate(fields).scheme_of("model.up")
    assert scheme is not None
    return plan_plain(ModuleShape("model.up", 128, 128, itemsize), scheme)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_preset_holds_what_is_stored_in_it(itemsize: int) -> None:
    names = [name for name, fields in PRESET_SCHEMES.items() if fields and fields.get("weights")]
    assert len(names) >= 10
    assert all(plan({"scheme": name}, itemsize).stored_bytes > 0 for name in names)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("where", [{"group_size": 16}, {"strategy": "channel"}, {"strategy": "tensor"}], ids=str)
def test_so_do_integers_of_all_bits(bits: int, symmetric: bool, where: dict[str, Any]) -> None:
    assert plan(weights(num_bits=bits, symmetric=symmetric, **where)).stored_bytes > 0


LOST = [
    weights(num_bits=1, strategy="channel"),
    weights(num_bits=16, group_size=16),
    weights(num_bits=16, strategy="tensor"),
    weights(num_bits=8, strategy="tensor_group", group_size=16),
    weights(num_bits=4, strategy="channel", scale_dtype="torch.uint8"),
    {"config_groups": {"own": {"weights": {"num_bits": 4, "group_size": 16}, "format": "nvfp4-pack-quantized"}}},
    group(input_activations={"num_bits": 1, "dynamic": True}),
    group(input_activations={"scale_dtype": "torch.uint8"}),
    group(output_activations={"num_bits": 1, "dynamic": True}),
]


@pytest.mark.parametrize("fields", LOST, ids=str)
def test_what_does_not_come_back_is_refused_with_the_error(fields: dict[str, Any]) -> None:
    """compressed-tensors takes these, and what it stores of a weight, or runs, is noise or zeros."""
    with pytest.raises(UnfitError, match=r"model\.up: .* does not hold .* come back with an error of \d+%.*`ignore`"):
        plan(fields)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (weights(num_bits=4, group_size=16, scale_dtype="float32"), "scale_dtype is torch.float32"),
        (weights(num_bits=4, group_size=16, symmetric=False, zp_dtype="float32"), "zp_dtype is torch.float32"),
        (group(input_activations={"group_size": 16}), "cannot run int8 by tensor; inputs int8, groups of 16"),
        (group(output_activations={"strategy": "attn_head"}), "cannot run int8 by tensor; outputs int8 by attn_head"),
        (
            weights(group_size=48),
            "groups of 48 do not divide the 128 columns of model.up; sizes that fit: [16, 32, 64, 128]",
        ),
        (weights(group_size=256), "groups of 256 do not divide the 128 columns of model.up"),
        (weights(strategy="block", block_structure="16x48"), "blocks of 48 columns do not divide the 128 of model.up"),
    ],
    ids=str,
)
def test_what_cannot_be_stored_or_run_is_refused_by_the_plan(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(UnfitError) as caught:
        plan(fields)
    assert text in str(caught.value)
    assert "model.up" in str(caught.value)


def test_a_range_too_wide_for_its_scale_is_told_with_the_module(tmp_path: Path) -> None:
    model = make_model()
    weight = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    with torch.no_grad():
        weight[0, :2] = torch.tensor([3e38, -3e38])
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    fields = {"targets": [MLP], **weights(num_bits=4, group_size=16, symmetric=False)}
    with pytest.raises(
        NumericalError,
        match=r"of the 2048 weights of model\.layers\.0\.mlp\.down_proj are not finite as int4 asymm.*`ignore`",
    ):
        armor_recipes.apply(recipe(folder, tmp_path / "out", QuantizationModifier=fields))
