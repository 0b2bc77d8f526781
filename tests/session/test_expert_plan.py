"""What the plan says of experts: how many are taken, how many tokens they can expect, what cannot be done, and memory."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import DbrxConfig, Ernie4_5_MoeConfig, LlamaConfig, MixtralConfig

from armor_recipes.errors import PlanError
from armor_recipes.model.facts import facts_of
from armor_recipes.plan.experts import ExpertsPlan, held_bytes
from tests.support.engine import make_model
from tests.support.mixtures import COUNT, EXPERTS, LAYER, TOP_K, make_mixture, mixture_recipe, plan_of

ARMOR: dict[str, Any] = {"targets": [EXPERTS], "block_size": 8, "iterations": 2}
KEY = "prune_stage.armor_modifiers.ARMORModifier"


def test_expected_tokens_are_those_of_an_even_router() -> None:
    _, plan, _ = plan_of(mixture_recipe(ARMORModifier=ARMOR), make_mixture())
    tokens = 60 * TOP_K // COUNT
    assert plan.experts == tuple(
        ExpertsPlan(KEY, LAYER.format(layer), COUNT, COUNT, tokens, 128, "layer-moment") for layer in range(2)
    )
    assert all(layer.too_few for layer in plan.experts)
    assert plan.to_dict()["experts"][1]["expected_tokens"] == tokens


def test_some_of_the_experts_and_all_tokens() -> None:
    fields = {**ARMOR, "targets": [r"re:.*layers\.1\..*experts\.[0-2]\..*_proj"]}
    mapping = mixture_recipe(ARMORModifier=fields, calibration={"experts": "all"}, moe={"minimum_tokens": 60})
    _, plan, _ = plan_of(mapping, make_mixture())
    assert plan.experts == (ExpertsPlan(KEY, LAYER.format(1), 3, COUNT, 60, 60, "layer-moment"),)
    assert not plan.experts[0].too_few


def test_a_plan_without_experts_says_nothing_of_them_but_that_keys_have_no_effect() -> None:
    fields = {"targets": [r"re:.*self_attn\..*_proj"], "block_size": 8}
    _, plan, _ = plan_of(mixture_recipe(ARMORModifier=fields), make_model())
    assert "experts" not in plan.to_dict()
    assert plan.notes == ()
    mapping = mixture_recipe(ARMORModifier=fields, calibration={"experts": "all"}, moe={})
    _, plan, _ = plan_of(mapping, make_model())
    assert [note.split(":")[0] for note in plan.notes] == ["`calibration.experts", "`moe` changes nothing"]


def test_matched_inputs_of_routed_experts_are_refused() -> None:
    fields = {**ARMOR, "objective": "hessian", "propagate": "matched"}
    with pytest.raises(
        PlanError, match=r"propagate: matched compares what model\.layers\.0\..* \(and 23 more"
    ) as error:
        plan_of(mixture_recipe(ARMORModifier=fields), make_mixture())
    assert "`calibration.experts: all`" in str(error.value)


def test_modules_that_cannot_be_given_all_tokens_are_refused() -> None:
    model = make_mixture()
    experts: Any = model.get_submodule(LAYER.format(1))
    experts.__class__ = type("Others", (type(experts),), {"every_expert": None})
    with pytest.raises(PlanError, match=r"`calibration\.experts: all`: model\.layers\.1\.mlp\.experts\.0\.gate_proj"):
        plan_of(mixture_recipe(ARMORModifier=ARMOR, calibration={"experts": "all"}), model)


def test_memory_of_all_statistics_of_a_block() -> None:
    _, plan, instances = plan_of(mixture_recipe(ARMORModifier={**ARMOR, "objective": "hessian"}), make_mixture())
    assert held_bytes(plan.rows, instances) == COUNT * 2 * 8 * (32**2 + 64**2)
    _, plan, instances = plan_of(mixture_recipe(ARMORModifier=ARMOR), make_mixture())
    assert held_bytes(plan.rows, instances) == COUNT * 8 * (32 + 64)
    assert held_bytes([], instances) == 0


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (MixtralConfig(num_experts_per_tok=3), 3),
        (Ernie4_5_MoeConfig(moe_k=5), 5),
        (DbrxConfig(ffn_config={"moe_top_k": 2}), 2),
        (LlamaConfig(), None),
    ],
)
def test_experts_of_a_token_by_the_config(config: Any, found: int | None) -> None:
    assert facts_of(config).experts_per_token == found
