"""benchmarks/journal.py: runs with and without a journal, and what their records say."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.support.engine import ARMOR, recipe
from tests.support.pages import ROOT


@pytest.mark.slow
def test_a_turn_has_one_run_of_each(llama: Path, tmp_path: Path) -> None:
    file, work = tmp_path / "recipe.yaml", tmp_path / "work"
    file.write_text(yaml.safe_dump(recipe(llama, ARMORModifier=ARMOR)))
    command = [sys.executable, str(ROOT / "benchmarks/journal.py"), str(file), "--work", str(work), "--turns", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    changed = [*command, "--set", "prune_stage.armor_modifiers.ARMORModifier.iterations=2"]
    done = subprocess.run(changed, capture_output=True, text=True, check=True, env=environment)
    first, second, *lines = done.stdout.splitlines()
    assert (first, second) == ("turn 0, with a journal …", "turn 0, without a journal …")
    found = {row: json.loads((work / "turn0" / f"{row}.json").read_text()) for row in ("with", "without")}
    kept = found["with"]["journal"]
    # What run it is of, two layers' changes, the second one's door, the end of the stack, the output.
    assert kept["records"] == 6
    assert kept["bytes"] > 0
    assert 0 < kept["seconds"] < found["with"]["seconds"]
    assert found["without"]["journal"] == {"seconds": 0.0, "cpu_seconds": 0.0, "bytes": 0, "records": 0}
    ratio = found["with"]["seconds"] / found["without"]["seconds"]
    assert f"ratio {ratio:.4f} [{ratio:.4f}, {ratio:.4f}]" in lines[0]
    assert sorted(path.name for path in (work / "turn0").iterdir()) == ["with.json", "without.json"]
    again = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert again.stdout.splitlines() == lines  # what exists is not run again
