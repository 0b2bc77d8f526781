"""What a recipe may say of schemes, and what it may not, told with the place in it before a model is read."""

from __future__ import annotations

from typing import Any

import pytest

from armor_recipes.errors import RecipeError
from armor_recipes.modifiers.quantization import QuantizationConfig
from armor_recipes.run.job import read_recipe

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
    (weights(strategy="block", block_structure="0x128"), "compressed-tensors refuses it: weights"),
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
