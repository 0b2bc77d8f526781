"""Refiners through the command line on the embedded model: what is printed and written, and equal bytes in equal runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from armor_recipes.checkpoint.staging import REPORT_FILES
from armor_recipes.model.calls import LayerCall
from armor_recipes.run import apply
from tests.support.commands import Shell

ARMOR = {"targets": [r"re:.*layers\.[01]\.mlp\..*_proj$"], "block_size": 32, "iterations": 2, "propagate": "dense"}
REFINERS: dict[str, dict[str, Any]] = {
    "BlockRefineModifier": {"epochs": 2, "learning_rate": 0.003},
    "DistillationModifier": {"learning_rate": 0.003},
}
#: Of each refiner: how the plan, the progress and the summary tell of it.
LINES = {
    "BlockRefineModifier": (
        "BlockRefineModifier: trains the factors of 6 of them, layer by layer (2), on 384 tokens; bytes stay",
        r"  model\.layers\.1: held-out loss (0\.\d{5}) -> (0\.\d{5}) in \d+ steps, \d+:\d\d left",
        r"BlockRefineModifier: held-out loss (0\.\d{5}) -> (0\.\d{5}), \d+ steps, 2 unit\(s\)",
    ),
    "DistillationModifier": (
        "DistillationModifier: trains the factors of 6 of them, all at once, on 384 tokens; bytes stay",
        r"  model: held-out loss (0\.\d{5}) -> (0\.\d{5}) in 1 steps, \d+:\d\d left",
        r"DistillationModifier: held-out loss (0\.\d{5}) -> (0\.\d{5}), 1 steps, 1 unit\(s\)",
    ),
}


@pytest.fixture(params=REFINERS)
def name(request: pytest.FixtureRequest) -> str:
    found: str = request.param
    return found


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def mapping(name: str) -> dict[str, Any]:
    return {
        "model": "builtin:stdlib-llama",
        "calibration": {"dataset": "builtin:pydoc", "samples": 6, "sequence_length": 64, "batch_size": 2},
        "prune_stage": {"armor_modifiers": {"ARMORModifier": ARMOR, name: REFINERS[name]}},
        "output": {"path": "out"},
    }


@pytest.fixture
def file(tmp_path: Path, name: str) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(mapping(name), sort_keys=False))
    return path


def test_a_plan_has_a_line_for_it(shell: Shell, file: Path, name: str) -> None:
    done = shell("armor-apply", file, "--plan")
    assert (done.code, done.err) == (0, "")
    assert LINES[name][0] in done.out.splitlines()
    plan = json.loads(shell("armor-apply", file, "--plan", "--json").out)["plan"]
    assert {r["modifier"] for r in plan["refinements"]} == {f"prune_stage.armor_modifiers.{name}"}


def test_the_summary_tells_of_units_that_training_did_not_better(shell: Shell, file: Path, name: str) -> None:
    done = shell("armor-apply", file, "--set", f"prune_stage.armor_modifiers.{name}.learning_rate=1.0")
    assert done.code == 0
    assert re.search(
        rf"{name}: held-out loss (0\.\d{{5}}) -> \1, \d+ steps, (\d) unit\(s\)(?:, \d+ gradient\(s\) clipped)?, "
        r"\2 of them left as before: training raised it; lower `learning_rate`",
        done.out,
    )


def test_progress_and_summary_tell_the_held_out_losses(shell: Shell, file: Path, name: str) -> None:
    done = shell("armor-apply", file)
    assert done.code == 0, done.err
    for pattern, text in zip(LINES[name][1:], (done.err, done.out), strict=True):
        found = re.search(f"^{pattern}$", text, flags=re.MULTILINE)
        assert found, text
        assert float(found[2]) < float(found[1])
    assert ("DistillationModifier (prune_stage)" in done.err.splitlines()) == (name == "DistillationModifier")
    assert done.err.splitlines()[-1] == "verify"


def test_the_summary_tells_of_batches_that_go_as_a_whole_only(
    shell: Shell, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("armor_recipes.modifiers.kinds.refiner._PART_TOKENS", 64)
    monkeypatch.setattr(LayerCall, "comes_apart", lambda *_: False)
    done = shell("armor-apply", file)
    assert done.code == 0, done.err
    told = re.search(r"Modifier: held-out loss .* unit\(s\)(.*)$", done.out, flags=re.MULTILINE)
    assert told
    by_layer = "BlockRefineModifier:" in done.out  # a model takes token ids, which always come apart
    assert (", 6 batch(es) only as a whole, on fewer cores" in told[1]) == by_layer


def test_what_is_written_says_what_was_trained(shell: Shell, file: Path, name: str, tmp_path: Path) -> None:
    done = shell("armor-apply", file, "--json", "--quiet")
    result = json.loads(done.out)
    manifest = json.loads((tmp_path / "out" / "armor_manifest.json").read_text())
    key = f"prune_stage.armor_modifiers.{name}"
    units = ["model"] if name == "DistillationModifier" else ["model.layers.0", "model.layers.1"]
    assert [row["unit"] for row in manifest["refinements"]] == units
    for row, shown in zip(manifest["refinements"], result["refinements"], strict=True):
        assert set(row) == {
            "modifier", "unit", "modules", "norm_values", "tokens", "losses", "steps", "clipped", "whole_batches", "stop_reason",
            "compute_dtype",
        }  # fmt: skip
        assert row["compute_dtype"] == shown["compute_dtype"]
        assert (row["modifier"], row["losses"]) == (shown["modifier"], shown["losses"]) == (key, row["losses"])
        assert min(row["losses"]) < row["losses"][0]
        assert row["tokens"] == 6 * 64
        assert row["whole_batches"] == 0
        assert row["norm_values"] == (9 * 256 if name == "DistillationModifier" else 2 * 256)
    assert {tuple(row["refined"]) for row in manifest["modules"].values()} == {(key,)}
    assert set(result["report"]["seconds_by_refinement"]) == {f"{key} {unit}" for unit in units}
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"The factors of 6 of these weights were trained afterwards: {name}." in card


@pytest.mark.usefixtures("threads")
def test_equal_runs_write_equal_bytes_on_one_thread_and_two(
    shell: Shell, file: Path, name: str, tmp_path: Path
) -> None:
    written = []
    for number, count in enumerate((1, 2)):
        torch.set_num_threads(count)
        result = apply(file, output=tmp_path / str(number))
        files = {p.name: p.read_bytes() for p in result.output.iterdir()}
        written.append(
            {n: content for n, content in files.items() if n not in (*REPORT_FILES, "recipe.yaml", "README.md")}
        )
    assert {"armor_manifest.json", "model.safetensors"} <= written[0].keys()
    for other in written[1:]:
        assert [n for n in written[0] if written[0][n] != other[n]] == []
