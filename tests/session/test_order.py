"""Rules about the order of modifiers: what is refused, with an order that works, and what is warned of."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from torch import Tensor

from armor_recipes import apply
from armor_recipes.errors import PlanError
from armor_recipes.modifiers import AnyModifier, Estimate, Modifier, ModuleShape, Outcome, SolveProgress, registry
from armor_recipes.recipe import ModifierConfig
from tests.support.engine import ATTENTION, MLP, make_job, recipe

FIRST_LINE = r"ScaleModifier: cannot follow ARMORModifier on .*\(and 7 more like it: .*\): it scales what was fitted; "


class ScaleConfig(ModifierConfig):
    """Nothing of its own."""


class ScaleModifier(Modifier[ScaleConfig]):
    """Leaves weights as they are, and is one of a kind in its rules."""

    config_type = ScaleConfig
    category: ClassVar[str] = "scale"
    cannot_follow: ClassVar[dict[str, str]] = {"factors": "it scales what was fitted"}

    def plan(self, module: ModuleShape) -> Estimate:
        return Estimate(stored_bytes=module.dense_bytes, flops=1.0, peak_bytes=1)

    def statistic(self, module: ModuleShape) -> Any:
        raise AssertionError("nothing to calibrate")

    def solve(self, module: ModuleShape, weight: Tensor, statistic: Any, on_progress: SolveProgress | None) -> Outcome:
        return Outcome(weight=weight.float(), losses=(0.0,))

    def loss(self, weight: Tensor, statistic: Any, approximation: Tensor) -> float:
        return 0.0

    def poor_after(self, earlier: AnyModifier[Any], rows: Sequence[Any]) -> str:
        assert all(row.name for row in rows)
        return "perplexity 52.8, 39.4 without" if "prune" in earlier.words else ""


class StretchModifier(ScaleModifier):
    """Must come before pruning."""

    category: ClassVar[str] = "stretch"
    cannot_follow: ClassVar[dict[str, str]] = {"scale": "it stretches what was scaled", "prune": "it fills zeros"}
    needs_after: ClassVar[dict[str, str]] = {"prune": "it only makes room for a modifier that prunes"}


class ShrinkModifier(ScaleModifier):
    """Must come after scaling."""

    category: ClassVar[str] = "shrink"
    cannot_follow: ClassVar[dict[str, str]] = {}
    needs_before: ClassVar[dict[str, str]] = {"scale": "it takes back what a modifier has scaled"}


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    registry.modifiers()
    before = dict(registry._REGISTERED)
    for kind in (ScaleModifier, StretchModifier, ShrinkModifier):
        registry.register(kind)
    yield
    registry._REGISTERED.clear()
    registry._REGISTERED.update(before)


def planned(model: Path, *names: str, **fields: Any) -> Any:
    """The plan of modifiers that all take the attention's projections, in that order."""
    needed = {"ARMORModifier": {"block_size": 8}, "WandaPruningModifier": {"pattern": "2:4"}}
    given = {name: {"targets": [ATTENTION], **fields, **needed.get(name, {})} for name in names}
    mapping = recipe(model, **given)
    if not any(name in ("ARMORModifier", "WandaPruningModifier") for name in names):
        del mapping["calibration"]
    return make_job(mapping).plan


def test_a_wrong_order_is_refused_with_one_that_works(llama: Path) -> None:
    with pytest.raises(PlanError, match=FIRST_LINE + r"an order that works: ScaleModifier, ARMORModifier$"):
        planned(llama, "ARMORModifier", "ScaleModifier")
    with pytest.raises(
        PlanError, match=r"an order that works: StretchModifier, ScaleModifier, ARMORModifier"
    ) as caught:
        planned(llama, "ARMORModifier", "ScaleModifier", "StretchModifier")
    assert str(caught.value).count("cannot follow") == 3
    assert planned(llama, "StretchModifier", "ScaleModifier", "ARMORModifier").warnings == ()


def test_where_no_order_works_that_is_said(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ScaleModifier, "cannot_follow", {"stretch": "it scales what was stretched"})
    with pytest.raises(PlanError, match=r"it stretches what was scaled; no order of them works: remove one, or narrow"):
        planned(llama, "ScaleModifier", "StretchModifier", "WandaPruningModifier")


def test_rules_are_about_modules_that_both_take(llama: Path) -> None:
    armor = {"targets": [MLP], "block_size": 8}
    assert make_job(recipe(llama, ARMORModifier=armor, ScaleModifier={"targets": [ATTENTION]})).plan.warnings == ()


def test_what_must_come_before_or_after_is_asked_for(llama: Path) -> None:
    with pytest.raises(
        PlanError, match=r"StretchModifier: it only makes room for a modifier that prunes; put one that"
    ):
        planned(llama, "StretchModifier", "ScaleModifier")
    with pytest.raises(
        PlanError, match=r"ShrinkModifier: it takes back what a modifier has scaled; put one .* before it"
    ):
        planned(llama, "ShrinkModifier")
    assert planned(llama, "ScaleModifier", "ShrinkModifier").warnings == ()


def test_what_was_measured_to_be_poor_is_warned_of_with_the_figure(llama: Path) -> None:
    plan = planned(llama, "WandaPruningModifier", "ScaleModifier")
    (warning,) = plan.warnings
    assert warning.modifier == "prune_stage.armor_modifiers.ScaleModifier"
    assert warning.text.startswith(
        "after WandaPruningModifier on model.layers.0.self_attn.q_proj (and 7 more like it: "
    )
    assert warning.text.endswith("): perplexity 52.8, 39.4 without")
    assert plan.to_dict()["warnings"] == [{"modifier": warning.modifier, "text": warning.text}]


@pytest.mark.parametrize(
    ("bits", "fields", "figure"),
    [
        (4, {"resolve": False}, "38 %"),
        (4, {"gauge": False}, "12 to 18 %"),
        (4, {"rounding": "nearest"}, "1.5 %"),
        (4, {}, "10 to 12 %"),
        (8, {}, ""),
    ],
)
def test_int4_cores_are_warned_of(llama: Path, bits: int, fields: dict[str, Any], figure: str) -> None:
    groups = {"core": {"weights": {"num_bits": bits, "strategy": "group", "group_size": 16}}}
    armor = {"targets": [MLP], "block_size": 8}
    quantize = {"targets": [MLP], "config_groups": groups, **fields}
    told = make_job(recipe(llama, ARMORModifier=armor, QuantizationModifier=quantize)).plan.warnings
    assert bool(told) == bool(figure)
    assert all(figure in warning.text for warning in told)


@pytest.mark.parametrize(
    ("scheme", "gauge", "figure"), [("W8A8", False, "4.1 %"), ("W8A8", True, ""), ("FP8_DYNAMIC", False, "")]
)
def test_integer_activations_without_a_gauge_are_warned_of(llama: Path, scheme: str, gauge: bool, figure: str) -> None:
    armor = {"targets": [MLP], "block_size": 8}
    quantize = {"targets": [MLP], "scheme": scheme, "gauge": gauge}
    told = make_job(recipe(llama, ARMORModifier=armor, QuantizationModifier=quantize)).plan.warnings
    assert bool(told) == bool(figure)
    assert all(figure in warning.text for warning in told)


@pytest.mark.parametrize(
    ("fields", "figure"),
    [
        ({"objective": "hessian"}, "`objective: hessian` calibrated on one kind of text was 4 %"),
        ({"objective": "hessian", "shrinkage": 0.25}, "`objective: hessian` calibrated on one kind of text was 4 %"),
        ({"objective": "hessian", "shrinkage": 0.5}, ""),
        ({"propagate": "matched"}, "`propagate: matched` calibrated on one kind of text was 5 %"),
        (
            {"objective": "hessian", "propagate": "matched"},
            "`objective: hessian` calibrated on one kind of text was 4 %",
        ),
        ({"propagate": "matched", "shrinkage": 0.5}, "`propagate: matched` calibrated on one kind of text was 5 %"),
        ({}, ""),
    ],
)
def test_what_fits_its_text_is_warned_of_with_one_dataset(llama: Path, fields: dict[str, Any], figure: str) -> None:
    mapping = recipe(llama, ARMORModifier={"targets": [MLP], "block_size": 8, **fields})
    told = make_job(mapping).plan.warnings
    assert [warning.text.startswith(figure) for warning in told] == [True] * bool(figure)
    texts = (mapping["calibration"]["dataset"], "builtin:jargon")
    mapping["calibration"]["dataset"] = [{"dataset": text, "weight": 1} for text in texts]
    assert make_job(mapping).plan.warnings == ()


def test_an_ignore_that_matches_nothing_is_a_warning_that_is_counted(llama: Path, tmp_path: Path) -> None:
    fields = {
        "targets": [MLP],
        "pattern": "2:4",
        "ignore": ["lm_head", "re:.*router$", r"re:.*layers\.0\..*", "Conv1d"],
    }
    result = apply(recipe(llama, tmp_path / "out", WandaPruningModifier=fields))
    told = [warning.text for warning in result.plan.warnings]
    assert told == [
        f"`ignore` {name!r} matches no module of this model and holds nothing back"
        for name in ("re:.*router$", "Conv1d")
    ]
    for name in ("armor_manifest.json", "report.json"):
        assert [row["text"] for row in json.loads((result.output / name).read_text())["warnings"]] == told
    again = apply(recipe(llama, tmp_path / "again", WandaPruningModifier={**fields, "ignore": ["lm_head"]}))
    assert "warnings" not in again.report


def test_an_ignore_of_a_module_with_linear_ones_in_it_is_a_warning(llama: Path) -> None:
    """As in compressed-tensors it holds back what it names, and not what is inside."""
    fields = {"targets": [MLP], "pattern": "2:4"}
    for pattern in ("model.layers.0.mlp", "LlamaMLP", r"re:model\.layers\.0\.mlp$"):
        plan = make_job(recipe(llama, WandaPruningModifier={**fields, "ignore": [pattern]})).plan
        (told,) = (warning.text for warning in plan.warnings)
        assert told.startswith(f"`ignore` {pattern!r} matches model.layers.0.mlp (LlamaMLP) and no linear module")
        assert "model.layers.0.mlp.up_proj" in {row.name for row in plan.modules}
        advised = told.rpartition("write ")[2].strip("'")
        kept = make_job(recipe(llama, WandaPruningModifier={**fields, "ignore": [advised]})).plan
        assert {row.name.split(".")[2] for row in kept.modules} == {"1"}
        assert not kept.warnings
    norms = {**fields, "ignore": ["LlamaRMSNorm", r"re:.*layers\.0(\..*)?$"]}
    assert not make_job(recipe(llama, WandaPruningModifier=norms)).plan.warnings
