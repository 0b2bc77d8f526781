"""AWQ: what its search is told by the entries behind it, that the function stays, and that quantising costs less for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from armor_recipes.errors import PlanError
from armor_recipes.modifiers import modifiers
from armor_recipes.run import Job
from armor_recipes.session import Session
from tests.support.engine import (
    ALL,
    ARMOR,
    ATTENTION,
    MLP,
    core,
    make_job,
    make_model,
    make_session,
    recipe,
    save_model,
)

CONFIG = modifiers()["AWQModifier"].config_type
LAYER = "model.layers.0"


def scheme(num_bits: int = 4, group_size: int = 16, **weights: Any) -> dict[str, Any]:
    """Fields of a quantiser of all linear modules of layers."""
    return {
        "targets": [ALL],
        "config_groups": {"g": {"weights": {"num_bits": num_bits, "group_size": group_size, **weights}}},
    }


def job(source: Path, fields: Mapping[str, Any], quantiser: Mapping[str, Any] | None = None) -> Job:
    return make_job(recipe(source, AWQModifier=fields, QuantizationModifier=quantiser or scheme()))


def run(job: Job) -> Session:
    with make_session(job) as session:
        session.run()
    return session


def smoothed(source: Path, **fields: Any) -> Session:
    """A session in which nothing was rounded yet: the quantiser stands in a stage of its own, which is not run."""
    awq = make_job(
        {
            **recipe(source, AWQModifier={"n_grid": 4, **fields}),
            "quant_stage": {"quant_modifiers": {"QuantizationModifier": scheme()}},
        }
    )
    with make_session(awq) as session, torch.no_grad():
        session._run_stage("prune_stage")
    return session


def done(session: Session) -> dict[str, int]:
    """How many readers each module of the first layer has that was scaled."""
    found = [result for result in session.section("smoothings") if not result.left and LAYER in result.source]
    return {result.source.removeprefix(f"{LAYER}."): len(result.readers) for result in found}


@pytest.mark.parametrize(
    ("kind", "sources"),
    [
        ("llama", {"input_layernorm": 3, "post_attention_layernorm": 2, "self_attn.v_proj": 1, "mlp.up_proj": 1}),
        ("qwen2-bias", {"input_layernorm": 3, "post_attention_layernorm": 2, "mlp.up_proj": 1}),
        ("gemma3", {"input_layernorm": 3, "pre_feedforward_layernorm": 2, "mlp.up_proj": 1}),
    ],
)
def test_the_function_stays(kind: str, sources: dict[str, int], tmp_path: Path) -> None:
    session = smoothed(save_model(tmp_path / kind, kind, torch.float32), duo_scaling=False)
    assert done(session) == sources
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        dense = make_model(kind, torch.float32)(ids).logits
        torch.testing.assert_close(session.model(ids).logits, dense, rtol=1e-4, atol=1e-4)
    assert max(result.largest for result in session.section("smoothings")) > 1.1


def test_modules_whose_sizes_differ_are_left_and_listed(tmp_path: Path) -> None:
    mappings = [
        {"smooth_layer": "re:.*v_proj$", "balance_layers": ["re:.*o_proj$"]},
        ["re:.*up_proj$", ["re:.*down_proj$"]],
    ]
    session = run(job(save_model(tmp_path, "qwen2-bias"), {"n_grid": 3, "mappings": mappings}))
    assert done(session) == {"mlp.up_proj": 1}
    left = [result.left for result in session.section("smoothings") if result.left]
    assert left[0] == f"its 16 outputs are not the 32 inputs of {LAYER}.self_attn.o_proj"
    assert len(left) == len(session.plan.layers)


def test_the_loss_is_that_of_the_quantisation_that_follows(llama: Path) -> None:
    def losses(quantiser: dict[str, Any]) -> list[tuple[float, float]]:
        session = run(job(llama, {"n_grid": 4}, quantiser))
        return [(result.first_loss, result.loss) for result in session.section("smoothings")]

    four, eight = losses(scheme(4)), losses(scheme(8))
    assert all(best <= first for first, best in (*four, *eight))
    assert all(wide[0] < 0.05 * narrow[0] for narrow, wide in zip(four, eight, strict=True))


def test_the_first_loss_is_the_error_at_the_parents_output(llama: Path) -> None:
    """Worked out again by hand: down_proj on its inputs, rounded to the grid of its groups."""
    only = {"n_grid": 2, "duo_scaling": False, "mappings": [["re:.*0.mlp.up_proj$", ["re:.*down_proj$"]]]}
    planned = job(llama, only)
    model = make_model("llama")
    inputs: list[Tensor] = []
    hook = model.get_submodule(f"{LAYER}.mlp.down_proj").register_forward_pre_hook(
        lambda _, args: inputs.append(args[0])
    )
    with make_session(planned, model) as session:
        (spec,) = session.tokens
        with torch.no_grad():
            for ids in session.tokens[spec].tensors["input_ids"].split(spec.batch_size):
                model(ids)
        hook.remove()
        weight = model.get_parameter(f"{LAYER}.mlp.down_proj.weight").detach().clone()
        session.run()
    groups = weight.unflatten(1, (-1, 16))
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).bfloat16().float()
    error = ((groups / scale).round().clamp(-8, 7) * scale).flatten(1) - weight
    wanted = torch.cat([(x @ error.T).flatten() for x in inputs]).square().mean()
    (result,) = session.section("smoothings")
    assert result.first_loss == pytest.approx(float(wanted), rel=0.02)  # products with scales are bfloat16 there


def test_large_channels_are_found(tmp_path: Path) -> None:
    model = make_model("llama", torch.float32)
    model.get_parameter(f"{LAYER}.post_attention_layernorm.weight").data[:2] *= 30
    model.save_pretrained(tmp_path)
    session = run(job(tmp_path, {}, scheme(4, 32)))
    (found,) = [r for r in session.section("smoothings") if r.source == f"{LAYER}.post_attention_layernorm"]
    assert found.loss < 0.5 * found.first_loss
    before, after = (m.get_parameter(f"{found.source}.weight").detach() for m in (model, session.model))
    kept = after / before
    assert float(kept[:2].max()) < 0.5 * float(kept[2:].min())


def test_only_what_is_quantised_behind_it_is_scaled(llama: Path) -> None:
    session = run(job(llama, {"n_grid": 3}, {**scheme(), "targets": [MLP]}))
    assert done(session) == {"post_attention_layernorm": 2, "mlp.up_proj": 1}
    session = run(job(llama, {"n_grid": 3, "targets": [r"re:.*q_proj"], "ignore": [r"re:.*layers\.1\..*"]}))
    assert done(session) == {"input_layernorm": 3}


def test_a_quantisation_must_follow(llama: Path) -> None:
    text = "AWQModifier: it chooses scales by what quantising whole weights costs, and quantises nothing itself: put a"
    with pytest.raises(PlanError, match=text):
        make_job(recipe(llama, AWQModifier={}))
    with pytest.raises(PlanError, match=r"move it to the front"):
        make_job(recipe(llama, QuantizationModifier=scheme(), AWQModifier={}))
    apart = recipe(llama, AWQModifier={"targets": [MLP]}, QuantizationModifier={**scheme(), "targets": [ATTENTION]})
    with pytest.raises(PlanError, match=text):
        make_job(apart)


def test_cores_of_factors_are_refused_with_the_reason(llama: Path) -> None:
    text = r"of model.layers.0.self_attn.q_proj \(and 13 more .*\) the entries behind it quantise the core .* `gauge`"
    with pytest.raises(PlanError, match=text):
        make_job(recipe(llama, AWQModifier={}, ARMORModifier=ARMOR, QuantizationModifier=core(targets=[ALL])))
    beside = {
        "ARMORModifier": {**ARMOR, "targets": [MLP]},
        "QuantizationModifier": {**scheme(), "targets": [ATTENTION]},
    }
    rows = make_job(recipe(llama, AWQModifier={}, **beside)).plan.section("smoothings")
    assert [row.source.removeprefix(f"{LAYER}.") for row in rows if row.layer == 0][:1] == ["input_layernorm"]
    assert all(name.startswith("model.layers.") and "self_attn" in name for row in rows for name in row.by_reader)


@pytest.mark.parametrize("names", [("SmoothQuantModifier", "AWQModifier"), ("AWQModifier", "SmoothQuantModifier")])
def test_smoothquant_may_stand_before_or_behind(names: tuple[str, str], tmp_path: Path) -> None:
    fields = {"AWQModifier": {"n_grid": 4}, "SmoothQuantModifier": {}}
    smoothing = recipe(save_model(tmp_path, "llama", torch.float32), **{name: fields[name] for name in names})
    both = {**smoothing, "quant_stage": {"quant_modifiers": {"QuantizationModifier": scheme()}}}
    with make_session(make_job(both)) as session, torch.no_grad():
        session._run_stage("prune_stage")
    found = [result for result in session.section("smoothings") if not result.left]
    assert [result.modifier.rpartition(".")[2] for result in found if result.source == f"{LAYER}.input_layernorm"] == [
        *names
    ]
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        dense = make_model("llama", torch.float32)(ids).logits
        torch.testing.assert_close(session.model(ids).logits, dense, rtol=1e-4, atol=1e-4)


def test_factors_of_an_earlier_stage_are_not_scaled(llama: Path) -> None:
    """Nor those whose norm may be read by what is quantised whole, with an order that works."""
    armor = recipe(llama, ARMORModifier={**ARMOR, "targets": [ATTENTION]})
    late = {"AWQModifier": {"n_grid": 3}, "QuantizationModifier": {**scheme(), "targets": [MLP]}}
    text = r"cannot follow ARMORModifier .* an order that works: AWQModifier, ARMORModifier, QuantizationModifier"
    with pytest.raises(PlanError, match=text):
        make_job({**armor, "late_stage": {"late_modifiers": late}})
    mlp = {"n_grid": 3, "mappings": [["re:.*post_attention_layernorm$", ["re:.*gate_proj$", "re:.*up_proj$"]]]}
    session = run(make_job({**armor, "late_stage": {"late_modifiers": {**late, "AWQModifier": mlp}}}))
    assert done(session) == {"post_attention_layernorm": 2}


def test_one_scale_of_a_whole_weight_goes_without_duo_scaling(llama: Path) -> None:
    whole = {"targets": [ALL], "config_groups": {"g": {"weights": {"num_bits": 8}}}}
    with pytest.raises(PlanError, match=r"duo_scaling compares weights .* set duo_scaling: false"):
        job(llama, {}, whole)
    assert run(job(llama, {"n_grid": 3, "duo_scaling": False}, whole)).section("smoothings")


def test_mappings_that_change_the_function_are_refused(llama: Path) -> None:
    with pytest.raises(PlanError, match="`mappings` cannot be smoothed"):
        run(job(llama, {"n_grid": 3, "mappings": [["re:.*input_layernorm$", ["re:.*q_proj$"]]]}))
    for wrong in ([["re:.*norm$"]], [["re:a", "re:b"]], [{"smooth_layer": "re:a"}]):
        with pytest.raises(ValidationError):
            CONFIG(mappings=wrong)
    with pytest.raises(ValidationError, match="n_grid: 3 with duo_scaling: both: a grid of 3 points has no end"):
        CONFIG(n_grid=3, duo_scaling="both")


def test_a_search_is_estimated(llama: Path) -> None:
    few, many = (job(llama, {"n_grid": points}).plan for points in (5, 20))
    rows = [plan.section("smoothings") for plan in (few, many)]
    assert sum(row.flops for row in rows[1]) == pytest.approx(4 * sum(row.flops for row in rows[0]))
    tokens, block = 5 * 12, 32 * (4 * 32 + 3 * 64)
    passes = sum(row.flops for row in rows[1] if row.layer == 0) / (2.0 * tokens * 20)
    assert block < passes < 2.5 * block
