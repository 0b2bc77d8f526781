"""A plan of a recipe with a budget on the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from armor_recipes.cli.tables import resolved_recipe
from armor_recipes.run import apply
from tests.support.commands import Shell
from tests.support.engine import make_job, recipe


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
    assert done.err == "load weights\nmeasure\n"
    result = apply(file)
    assert result.report["measured"][0]["kept"]
    assert {row.name: list(row.block_size or ()) for row in result.plan.modules} == sizes


@pytest.mark.parametrize("count", [20, 21])
def test_many_sizes_are_counted_and_not_listed(llama: Path, count: int) -> None:
    plain = make_job(recipe(llama)).recipe
    sizes = {f"layers.{number}.up": [8, 16] for number in range(count)}
    made = replace(plain, resolved={**plain.resolved, "block_size": {"budget": 0.85, "sizes": sizes}})
    short, whole = (resolved_recipe(made, every=every)[1].plain for every in (False, True))
    assert "layers.19.up" in whole
    assert ("layers.19.up" in short) == (count == 20)
    assert ("sizes: 21 modules, shown with --all" in short) == (count == 21)
