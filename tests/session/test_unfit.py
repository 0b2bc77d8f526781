"""`unfit`: what a modifier cannot change is an error, or left as it is and listed with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from armor_recipes.cli.tables import plan_table, summary
from armor_recipes.errors import PlanError
from armor_recipes.run import apply
from tests.support.engine import ARMOR, ATTENTION, MLP, core, make_job, recipe, save_model

SKIP = {"unfit": "skip"}


@pytest.fixture(scope="module")
def gqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers; k_proj and v_proj are 16x32; lm_head is the embedding."""
    return save_model(tmp_path_factory.mktemp("gqa") / "m", "llama-gqa-tied")


def printed(renderable: Any) -> str:
    console = Console(width=400, no_color=True)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get()


def test_what_blocks_do_not_divide_is_left_and_listed(gqa: Path) -> None:
    job = make_job(recipe(gqa, ARMORModifier={**ARMOR, "block_size": 32, **SKIP}))
    skipped = job.plan.skipped
    assert [(one.name, one.kind, one.shape) for one in skipped] == [
        (f"model.layers.{layer}.self_attn.{part}_proj", "Linear", (16, 32)) for layer in (0, 1) for part in "kv"
    ]
    assert skipped[0].reason.startswith("block_size 32 does not fit model.layers.0.self_attn.k_proj (16x32)")
    assert skipped[0].modifier == "prune_stage.armor_modifiers.ARMORModifier"
    assert not {row.name for row in job.plan.modules} & {one.name for one in skipped}
    assert job.plan.to_dict()["skipped"][0]["name"] == skipped[0].name
    text = printed(plan_table(job.plan, job.estimate))
    line = next(line for line in text.splitlines() if "k_proj" in line)
    assert line.startswith("left as they are by ARMORModifier: model.layers.{0-1}.self_attn.k_proj, ")
    other = make_job(recipe(gqa, ARMORModifier={**ARMOR, "block_size": 32, "ignore": [r"re:.*(k|v)_proj$"]}))
    assert other.plan.sha256 != job.plan.sha256
    assert other.plan.rows == job.plan.rows


def test_the_error_says_how_to_skip(gqa: Path) -> None:
    with pytest.raises(PlanError, match=r"\(and 3 more like it: .*\); `unfit: skip` leaves such modules as they are$"):
        make_job(
            recipe(gqa, ARMORModifier={**ARMOR, "block_size": 32, "targets": [r"re:.*(q|k)_proj$", "re:.*v_proj$"]})
        )


def test_modules_of_other_kinds_are_told_with_their_class_and_weights(gqa: Path) -> None:
    job = make_job(recipe(gqa, ARMORModifier={**ARMOR, "targets": ["re:.*"], **SKIP}))
    found = {one.name: one for one in job.plan.skipped}
    assert len(job.plan.modules) == 14
    assert (found["model.norm"].kind, found["model.norm"].shape) == ("LlamaRMSNorm", (32,))
    assert found["model.norm"].reason.endswith("a norm or other vectors, which hold no matrix (weight 32)")
    assert "rows of an embedding are looked up, not multiplied (weight 96x32)" in found["model.embed_tokens"].reason
    assert found["lm_head"].reason == "the weight of lm_head is tied to model.embed_tokens (Embedding)"


def test_nothing_left_is_an_error_unless_it_may_be(gqa: Path) -> None:
    fields = {**ARMOR, "targets": ["lm_head"], **SKIP}
    with pytest.raises(
        PlanError, match=r"`unfit: skip` leaves out all that `targets` matches \(1\): the weight of lm_head is tied"
    ):
        make_job(recipe(gqa, ARMORModifier=fields))
    plan = make_job(recipe(gqa, ARMORModifier={**fields, "optional": True}, NoWagModifier={"targets": [MLP]})).plan
    assert (len(plan.skipped), len(plan.modules)) == (1, 6)


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("NoWagModifier", {"targets": ["Linear"]}, "the weight of lm_head is tied"),
        (
            "QuantizationModifier",
            core(group_size=64, targets=[ATTENTION, MLP]),
            "groups of 64 do not divide the 32 columns of",
        ),
        ("ChannelPermutationModifier", {"targets": [r"re:.*(o|down|up)_proj$"]}, "`producers` does not say what makes"),
    ],
)
def test_every_kind_leaves_what_it_cannot_take(gqa: Path, name: str, fields: dict[str, Any], reason: str) -> None:
    before: dict[str, Any] = {}
    with pytest.raises(PlanError, match=reason):
        make_job(recipe(gqa, **before, **{name: fields}))
    plan = make_job(recipe(gqa, **before, **{name: {**fields, **SKIP}})).plan
    assert any(row.modifier.endswith(name) for row in plan.rows)
    assert any(one.reason.startswith(reason) for one in plan.skipped)


def test_a_refiner_that_trains_cores_leaves_integers(gqa: Path) -> None:
    armor, quantization = {**ARMOR, "targets": [MLP]}, core(targets=[r"re:.*down_proj$"])
    before = {"ARMORModifier": armor, "QuantizationModifier": quantization}
    fields = {"targets": ["Linear"], "core": True}
    with pytest.raises(
        PlanError, match="whose numbers stay as they are, and `core: true` would train them; leave `core` out"
    ):
        make_job(recipe(gqa, **before, BlockRefineModifier=fields))
    plan = make_job(recipe(gqa, **before, BlockRefineModifier={**fields, **SKIP})).plan
    assert [one.name for one in plan.skipped] == [f"model.layers.{i}.mlp.down_proj" for i in (0, 1)]
    assert {name.rsplit(".", 1)[-1] for row in plan.refinements for name in row.modules} == {"gate_proj", "up_proj"}
    plan = make_job(recipe(gqa, **before, BlockRefineModifier={"targets": ["Linear"]})).plan
    assert not plan.skipped
    assert {name.rsplit(".", 1)[-1] for row in plan.refinements for name in row.modules} == {
        "gate_proj",
        "up_proj",
        "down_proj",
    }


def test_a_run_tells_what_it_left(gqa: Path, tmp_path: Path) -> None:
    modifier = {**ARMOR, "targets": [ATTENTION], "block_size": 32, "iterations": 0, **SKIP}
    result = apply(recipe(gqa, tmp_path / "out", ARMORModifier=modifier))
    manifest, report = (json.loads((result.output / f"{n}.json").read_text()) for n in ("armor_manifest", "report"))
    assert manifest["skipped"] == report["skipped"] == json.loads(json.dumps(result.plan.to_dict()["skipped"]))
    assert "4 targeted modules were left as they are" in (result.output / "README.md").read_text()
    assert "left as they are by ARMORModifier: model.layers.{0-1}.self_attn.k_proj" in printed(summary(result))
    again = apply(recipe(gqa, tmp_path / "again", ARMORModifier={**modifier, "targets": [r"re:.*(q|o)_proj$"]}))
    assert "skipped" not in json.loads((again.output / "armor_manifest.json").read_text())
    assert "skipped" not in again.report
