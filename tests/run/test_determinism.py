"""Equal runs write equal bytes, and leave no trace of when, where and by whom."""

from __future__ import annotations

import json
import os
import platform
import re
import socket
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from armor_recipes.checkpoint.staging import REPORT_FILES
from armor_recipes.run import apply
from armor_recipes.version import release_of
from tests.support.engine import ARMOR, ATTENTION, MLP, recipe, rng_states, save_model


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory, so that recipes may name relative paths."""
    monkeypatch.chdir(tmp_path)
    save_model(Path("model"), "llama-gqa-tied")
    return tmp_path


def mixed(output: str, **fields: Any) -> dict[str, Any]:
    armor = {**ARMOR, "targets": [ATTENTION], **fields}
    return recipe("model", output, ARMORModifier=armor, NoWagModifier={"targets": [MLP], "propagate": "dense"})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in REPORT_FILES}


@pytest.mark.parametrize("fields", [{}, {"solver": "adam", "iterations": 4}])
def test_two_runs_write_the_same_bytes(workplace: Path, fields: dict[str, Any]) -> None:
    first = files(apply(mixed("one", **fields)).output)
    second = files(apply(mixed("elsewhere/two", **fields)).output)
    assert {"model.safetensors", "config.json", "armor_manifest.json", "recipe.yaml", "README.md"} <= first.keys()
    assert first.keys() == second.keys()
    differ = {name for name in first if first[name] != second[name]}
    assert differ <= {"recipe.yaml", "README.md"}  # they name output.path
    for name in differ:
        assert first[name].replace(b"path: one", b"path: elsewhere/two") == second[name]


def test_another_seed_writes_other_bytes(workplace: Path) -> None:
    first = files(apply(mixed("one", solver="adam", iterations=4)).output)
    second = files(apply(mixed("two", solver="adam", iterations=4, seed=1)).output)
    assert first["model.safetensors"] != second["model.safetensors"]
    assert first["armor_manifest.json"] != second["armor_manifest.json"]


def test_a_module_does_not_depend_on_which_others_are_in_the_recipe(workplace: Path) -> None:
    fields = {**ARMOR, "solver": "adam", "iterations": 4, "propagate": "dense"}
    alone = apply(recipe("model", "one", ARMORModifier={**fields, "targets": [r"re:.*layers\.1.*q_proj$"]}))
    together = apply(recipe("model", "two", ARMORModifier=fields))
    name = "model.layers.1.self_attn.q_proj"
    assert alone.modules[name].losses == together.modules[name].losses


def test_global_random_generators_are_left_alone(workplace: Path) -> None:
    before = rng_states()
    apply(mixed("out", solver="adam", iterations=4))
    assert rng_states() == before


def test_releases_are_those_that_a_process_began_with(monkeypatch: pytest.MonkeyPatch) -> None:
    assert release_of("numpy") == version("numpy")
    monkeypatch.setattr("armor_recipes.version.version", lambda _: "9999")
    assert release_of("numpy") == version("numpy")


def test_the_manifest_tells_nothing_of_time_and_place(workplace: Path) -> None:
    (workplace / "notes.txt").write_text("It was a bright cold day in April, and the clocks were striking.\n" * 90)
    mapping = recipe(
        "builtin:stdlib-llama", "out", ARMORModifier={"targets": [r"re:.*layers\.0.*q_proj$"], "iterations": 1}
    )
    mapping["calibration"] = {"dataset": "notes.txt", "samples": 2, "sequence_length": 16}
    mapping["evaluation"] = {"perplexity": {"dataset": "./notes.txt", "sequence_length": 16, "windows": 2}}
    result = apply(mapping)
    seconds = rf"(?<![\d.]){re.escape(str(result.report['seconds']))}(?![\d.])"  # 0.23 is no part of a release 0.23.3
    for name in ("armor_manifest.json", "config.json", "README.md", "recipe.yaml"):
        text = (result.output / name).read_text()
        for secret in (str(workplace), socket.gethostname(), str(Path.home()) + "/", platform.platform()):
            assert secret not in text, (name, secret)
        assert not re.search(seconds, text), (name, seconds)
    manifest = json.loads((result.output / "armor_manifest.json").read_text())
    assert manifest["evaluation"]["before"]["windows"] == 2
    assert {"armor_recipes", "compute", "versions", "recipe_sha256", "tensors"} <= manifest.keys()
    assert not [key for key in json.dumps(manifest).split('"') if key in ("seconds", "started", "host", "platform")]
    assert os.sep + "tmp" not in json.dumps(manifest)


def test_the_report_holds_what_differs(workplace: Path) -> None:
    report = json.loads((apply(mixed("out")).output / "report.json").read_text())
    assert report["seconds"] > 0
    assert set(report["seconds_by_phase"]) >= {"preflight", "compress", "save", "verify"}
    assert len(report["seconds_by_module"]) == 14
    assert report["size_before_bytes"] == sum(p.stat().st_size for p in Path("model").glob("*.safetensors"))
