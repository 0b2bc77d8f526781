"""`ARMORModifier` with patterns and blocks other than those that a checkpoint can pack."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest
import torch

from armor_recipes.modifiers import ModuleShape, config_types
from armor_recipes.modifiers.armor import ARMORConfig, ARMORModifier
from armor_recipes.recipe.json_schema import json_schema

SHAPE = ModuleShape("model.layers.0.mlp.up_proj", 16, 24, 2)


def made(**fields: Any) -> ARMORModifier:
    return ARMORModifier(ARMORConfig(targets=("Linear",), iterations=3, **fields))


@pytest.mark.parametrize(
    ("fields", "shape", "packed"),
    [
        ({"block_size": 8}, SHAPE, True),
        ({"block_size": (8, 12)}, SHAPE, True),
        ({"block_size": (8, 6)}, SHAPE, False),
        ({"block_size": 4}, ModuleShape("m", 16, 12, 2), False),
        ({"block_size": 8, "pattern": "4:8"}, SHAPE, False),
        ({"block_size": (4, 2), "pattern": "3:12"}, SHAPE, False),
    ],
)
def test_what_is_not_packed_is_planned_and_returned_dense(
    fields: dict[str, Any], shape: ModuleShape, packed: bool
) -> None:
    modifier = made(**fields)
    cost = modifier.plan(shape)
    assert cost.stored_as == ("packed" if packed else "dense")
    assert cost.block_size is not None
    assert (cost.factor_bytes > 0) == packed
    assert packed or cost.stored_bytes == shape.dense_bytes
    statistic = modifier.statistic(shape)
    generator = torch.Generator().manual_seed(0)
    statistic.update(torch.randn(8, shape.d_in, generator=generator))
    weight = torch.randn(shape.d_out, shape.d_in, generator=generator)
    outcome = modifier.solve(shape, weight, statistic, None)
    assert (outcome.factorization is not None) == packed
    assert outcome.losses[-1] == pytest.approx(modifier.loss(weight, statistic, outcome.weight), rel=1e-3)


def test_a_pattern_is_text_of_the_form_n_m() -> None:
    assert made(pattern="04:08").config.pattern == "4:8"
    for wrong in ("4", "4:4", "0:4", "2:64", "two of four"):
        with pytest.raises(pydantic.ValidationError, match="pattern"):
            made(pattern=wrong)
    with pytest.raises(pydantic.ValidationError):
        made(pattern=124)


def test_the_schema_says_what_a_pattern_looks_like() -> None:
    field = ARMORConfig.model_json_schema()["properties"]["pattern"]
    assert (field["type"], field["pattern"]) == ("string", "^[0-9]{1,2}:[0-9]{1,2}$")
    assert field["pattern"] in str(json_schema(config_types()))
