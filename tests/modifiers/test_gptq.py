"""GPTQ as a modifier: on the grid of rounding to nearest, nearer in what comes out, masks kept; and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from armor_recipes.errors import PlanError
from armor_recipes.modifiers import ModuleShape
from armor_recipes.modifiers.gptq import GPTQModifier
from armor_recipes.modifiers.plain import quantized
from armor_recipes.solver.hessian import quadratic_form
from tests.support.engine import ALL, ARMOR, MLP, make_job, make_session, recipe

SHAPE = ModuleShape("m", 24, 64, 4)


def weights(*, groups: int = 32, symmetric: bool = True, **more: Any) -> dict[str, Any]:
    return {"g": {"weights": {"num_bits": 4, "group_size": groups, "symmetric": symmetric, **more}}}


def solved(weight: Tensor, **fields: Any) -> tuple[Tensor, Tensor, Tensor, dict[str, int]]:
    """The weight by GPTQ and to nearest, the Gram matrix, and the counts."""
    modifier = GPTQModifier(GPTQModifier.config_type(targets=("Linear",), **fields))
    statistic = modifier.statistic(SHAPE)
    generator = torch.Generator().manual_seed(3)
    statistic.update(torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator))
    scheme = modifier.scheme_of("m", torch.nn.Linear(1, 1))
    assert scheme is not None
    outcome = modifier.quantize(SHAPE, weight, statistic, scheme, [weight])
    near = quantized(weight, scheme, statistic.range)
    for name, scales in near.tensors.items():
        assert "scale" not in name or torch.equal(outcome.packed.tensors[name], scales)
    found = outcome.packed.dequantize(torch.float32)
    return found, near.dequantize(torch.float32), statistic.moment.value, dict(outcome.counts)


@pytest.mark.parametrize(
    "fields",
    [
        {"config_groups": weights()},
        {"config_groups": weights(symmetric=False), "actorder": None},
        {"config_groups": weights(groups=-1)},
        {"scheme": "W8A8"},
        {"scheme": "FP8_DYNAMIC"},
        {"scheme": "FP8"},
        {"scheme": "NVFP4"},
    ],
)
def test_it_is_nearer_on_the_same_grid(fields: dict[str, Any]) -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    found, near, gram, counts = solved(weight, **fields)
    assert quadratic_form(weight - found, gram) < 0.8 * quadratic_form(weight - near, gram)
    assert counts == {}


def test_a_mask_stays() -> None:
    weight = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    weight[:, ::4] = weight[:, 1::4] = 0
    found, _, _, counts = solved(weight, config_groups=weights())
    assert not bool(found[:, ::4].any() | found[:, 1::4].any())
    assert counts == {"kept_zeros": 24 * 32}


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"scheme": "W4A16", "actorder": "group"}, "actorder: group is not here: `static` takes the columns"),
        ({"scheme": "W4A16", "block_size": 0}, "greater than or equal to 1"),
    ],
)
def test_fields_that_are_not_taken(fields: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        GPTQModifier.config_type(targets=("Linear",), **fields)


def test_two_orders_are_refused(llama: Path) -> None:
    fields = {"targets": [ALL], "config_groups": weights(actorder="static"), "actorder": None}
    with pytest.raises(PlanError, match="actorder is None on the modifier and static in its scheme"):
        make_job(recipe(llama, GPTQModifier=fields))


def test_factors_are_refused(llama: Path) -> None:
    with pytest.raises(PlanError, match="modules with ARMOR factors are quantised by QuantizationModifier"):
        make_job(recipe(llama, ARMORModifier=ARMOR, GPTQModifier={"targets": [ALL], "config_groups": weights()}))


def test_it_runs_after_smoothing_and_pruning(llama: Path) -> None:
    mapping = recipe(
        llama,
        SmoothQuantModifier={},
        WandaPruningModifier={"targets": [MLP], "pattern": "2:4"},
        GPTQModifier={"targets": [ALL], "config_groups": weights(groups=16)},
    )
    with make_session(make_job(mapping)) as session:
        session.run()
    for name, result in session.results.items():
        weight = session.model.get_submodule(name).weight
        kept = int((weight.view(len(weight), -1, 4) != 0).sum(-1).max())
        assert (kept == 2) == ("mlp" in name)
        assert ("kept_zeros" in result.counts) == ("mlp" in name)
