"""What is told of experts after a run: tokens by layer, what was left alone, and totals of what was done."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from armor_recipes.cli.tables import plan_table, summary
from armor_recipes.integrations.transformers import load
from armor_recipes.model.forms import restore
from armor_recipes.plan import RunEstimate
from armor_recipes.report.experts import expert_rows, totals_done
from armor_recipes.report.manifest import sections
from armor_recipes.run import Result, apply
from armor_recipes.runtime.linear import ArmorLinear
from armor_recipes.session import Session
from tests.support.engine import core
from tests.support.mixtures import COUNT, EXPERTS, LAYER, make_mixture, mixture_recipe, run, shun

ARMOR: dict[str, Any] = {"targets": [EXPERTS], "block_size": 8, "iterations": 1}
KEYS = [f"prune_stage.armor_modifiers.{name}" for name in ("ARMORModifier", "QuantizationModifier")]
QUANTIZED = {"ARMORModifier": ARMOR, "QuantizationModifier": core(targets=[EXPERTS], iterations=1)}


def session_of(below: str, minimum: int = 7, **fields: Any) -> Session:
    """A run in which six tokens reach expert 2 of the second layer."""
    model = make_mixture()
    shun(model, 1, 2, but=2)
    moe = {"minimum_tokens": minimum, "below": below}
    return run(mixture_recipe(moe=moe, **(fields or {"ARMORModifier": ARMOR})), model)


def rows_of(session: Session) -> list[dict[str, Any]]:
    return expert_rows(session.recipe, session.results, session.state.results)


@pytest.mark.parametrize("below", ["layer-moment", "skip"])
def test_tokens_of_each_layer(below: str) -> None:
    session = session_of(below, **QUANTIZED)
    rows = rows_of(session)
    by_layer = {(row["layer"], tuple(row["modifiers"])): row for row in rows}
    last = by_layer[LAYER.format(1), tuple(KEYS) if below == "layer-moment" else (KEYS[0],)]
    assert (last["experts"], last["fewest"], last["below"], last["done"]) == (COUNT, 6, 1, below)
    tokens = sorted(session.results[f"{LAYER.format(0)}.{e}.up_proj"].tokens for e in range(COUNT))
    first = by_layer[LAYER.format(0), tuple(KEYS)]
    assert [first[key] for key in ("fewest", "median", "most")] == [tokens[0], sum(tokens[1:3]) / 2, tokens[3]]
    assert (first["minimum_tokens"], first["below"]) == (7, 0)


def test_a_run_without_experts_tells_nothing_of_them() -> None:
    session = session_of("skip", ARMORModifier={**ARMOR, "targets": [r"re:.*self_attn\..*_proj"]})
    assert rows_of(session) == []
    assert sections(session.state.results).keys() == {"rearrangements", "refinements"}
    assert totals_done(session.plan, session.results, session.state.results) is session.plan.totals


def test_totals_are_of_what_was_done() -> None:
    session = session_of("skip", **QUANTIZED)
    planned = session.plan.totals
    totals = totals_done(session.plan, session.results, session.state.results)
    weights = 3 * 32 * 64 * 4
    assert totals.modules == planned.modules - 3 == len(session.results)
    assert totals.bytes_before == planned.bytes_before - weights
    assert totals.bytes_before - totals.bytes_after < planned.bytes_before - planned.bytes_after
    assert totals.untouched_bytes == planned.untouched_bytes + weights
    (names,) = {tuple(row["name"] for row in sections(session.state.results)["experts_below"])}
    assert names == tuple(f"{LAYER.format(1)}.2.{part}" for part in ("gate_proj", "up_proj", "down_proj"))


def printed(renderable: Any) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_the_summary_shows_them_by_layer() -> None:
    session = session_of("skip")
    report = {
        **{"size_after_bytes": 1, "size_before_bytes": 2, "seconds": 1.0, "peak_memory_bytes": 1, "calibration": []},
        **{
            "cpu_seconds": 1.0,
            "cpu_seconds_estimated": 1.0,
            "seconds_estimated": 1.0,
            "peak_memory_estimated_bytes": 1,
            "peak_anonymous_memory_bytes": 1,
        },
        "experts": rows_of(session),
    }
    result = Result(
        plan=session.plan,
        estimate=RunEstimate(0, 0.0),
        output=Path("out"),
        modules=session.results,
        results=session.state.results,
        evaluations=(),
        report=report,
    )
    text = printed(summary(result))
    assert "Calibration tokens of an expert" in text
    assert "too few" in text
    assert text.count("mlp.experts") == 2
    assert "ARMORModifier: 3 modules of experts saw fewer than 7 calibration tokens and were left as they were" in text
    assert f"{2 * COUNT * 3 - 3} modules in" in text


def test_the_plan_shows_them_in_one_line() -> None:
    session = session_of("skip", minimum=31)
    text = printed(plan_table(session.plan, RunEstimate(0, 0.0)))
    assert (
        "ARMORModifier: 4 of 4 experts in 2 layer(s), model.layers.0.mlp.experts to model.layers.1.mlp.experts; about 30 of its "
        "calibration tokens reach each, fewer than the 31 of moe.minimum_tokens (below: skip)"
    ) in " ".join(text.split())


@pytest.mark.parametrize("below", ["layer-moment", "skip"])
def test_a_run_from_folder_to_folder(below: str, tmp_path: Path) -> None:
    model = make_mixture()
    restore(model)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    mapping = mixture_recipe(moe={"minimum_tokens": 31, "below": below}, ARMORModifier=ARMOR)
    mapping |= {"model": str(tmp_path / "base"), "output": {"path": str(tmp_path / "out")}}
    result = apply(mapping)
    manifest = json.loads((tmp_path / "out" / "armor_manifest.json").read_text())
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert manifest["experts"] == report["experts"]
    told = manifest["experts_below"]
    assert {row["done"] for row in told} == {below}
    assert sum(row["below"] for row in manifest["experts"]) == len(told) / 3 > 0
    left = {row["name"] for row in told} if below == "skip" else set()
    assert set(manifest["modules"]) == set(result.plan.shapes) - left
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert left <= set(config["ignore"])
    loaded = load(tmp_path / "out")
    assert {name for name, m in loaded.named_modules() if isinstance(m, ArmorLinear)} == set(manifest["modules"])
