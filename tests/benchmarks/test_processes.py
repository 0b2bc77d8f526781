"""benchmarks/processes.py: runs by one and by two processes, compared by their reports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.benchmarks.test_rivals import benchmark
from tests.support.engine import ARMOR, recipe
from tests.support.pages import ROOT

PROGRAM = ROOT / "benchmarks" / "processes.py"


@pytest.mark.slow
def test_each_is_run_once_and_both_write_the_same(llama: Path, tmp_path: Path) -> None:
    file, rows = tmp_path / "recipe.yaml", tmp_path / "rows.json"
    file.write_text(yaml.safe_dump(recipe(llama, ARMORModifier=ARMOR)))
    command = [sys.executable, str(PROGRAM), str(file), "--work", str(tmp_path / "work"), "--json", str(rows)]
    changed = [*command, "--set", "prune_stage.armor_modifiers.ARMORModifier.iterations=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(changed, capture_output=True, text=True, check=True, env=environment)
    one, two = json.loads(rows.read_text())["rows"]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [one, two]
    assert [one["processes"], two["processes"]] == [1, 2]
    assert one["manifest_sha256"] == two["manifest_sha256"]
    assert [one["times_seconds"], one["times_work_seconds"]] == [1.0, 1.0]
    assert two["times_seconds"] == pytest.approx(one["seconds"] / two["seconds"], rel=1e-3)
    again = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert again.stdout == done.stdout  # what exists is not run again


def test_other_bytes_are_no_comparison() -> None:
    compared = benchmark("processes").compared
    rows = [{"processes": count, "seconds": 2.0, "work_seconds": 1.0, "manifest_sha256": "a"} for count in (1, 2)]
    assert [one["times_seconds"] for one in compared(rows)] == [1.0, 1.0]
    with pytest.raises(ValueError, match="2 processes wrote other bytes than 1"):
        compared([rows[0], {**rows[1], "manifest_sha256": "b"}])
