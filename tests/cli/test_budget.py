"""A plan of a recipe with a budget on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from armor_recipes.run import apply
from tests.support.commands import Shell
from tests.support.engine import recipe


def test_a_plan_measures_and_the_run_takes_its_sizes(
    shell: Shell, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    fields = {"targets": ["preset:all-linear"], "block_size": {"budget": 0.85, "windows": 2}, "iterations": 2}
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(recipe(llama, tmp_path / "out", ARMORModifier=fields)))
    done = shell("armor-apply", file, "--plan", "--json")
    assert done.code == 0, done.err
    found = json.loads(done.out)
    assert "not settled" not in done.out
    sizes = {row["name"]: row["block_size"] for row in found["plan"]["modules"]}
    written = found["recipe"]["prune_stage"]["armor_modifiers"]["ARMORModifier"]["block_size"]["sizes"]
    assert {name: [size, size] if isinstance(size, int) else size for name, size in written.items()} == sizes
    result = apply(file)
    assert result.report["measured"][0]["kept"]
    assert {row.name: list(row.block_size or ()) for row in result.plan.modules} == sizes
