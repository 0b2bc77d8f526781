"""What a plan's table says of the model's blocks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from armor_recipes.cli.names import common_parent, grouped
from armor_recipes.cli.tables import plan_table
from armor_recipes.recipe import builtin_recipes
from armor_recipes.run import Job, prepare
from armor_recipes.run.job import builtin_recipe_dir, read_recipe
from tests.support.engine import make_job, recipe, save_model
from tests.support.pages import planned_model


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    return make_job(recipe(save_model(tmp_path_factory.mktemp("llama") / "m")))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("layer.0", "layer.1"), "2 layers"),
        (("e.layers.0", "e.layers.1", "d.0"), "3 blocks (e.layers.{0-1}, d.0)"),
        (("h.0", "h.1", "proj", "head"), "4 blocks (h.{0-1}, proj, head)"),
        (tuple("abcdefgh"), "8 blocks (a, b, c, d, e, f and 2 more)"),
    ],
)
def test_a_plan_is_titled_by_its_blocks(job: Job, names: tuple[str, ...], said: str) -> None:
    console = Console(width=400, no_color=True)
    with console.capture() as captured:
        console.print(plan_table(replace(job.plan, layers=names), job.estimate))
    assert captured.get().splitlines()[0].strip() == f"Plan for {job.plan.model}: {said}"


@pytest.mark.parametrize(("quantised", "said"), [(False, True), (True, False)])
def test_pruned_weights_that_stay_dense_are_told(tmp_path: Path, *, quantised: bool, said: bool) -> None:
    entry = {"targets": "preset:mlp"}
    later = {"QuantizationModifier": {**entry, "scheme": "W8A8"}} if quantised else {}
    job = make_job(recipe(save_model(tmp_path / "m"), NoWagModifier=entry, **later))
    console = Console(width=400, no_color=True)
    with console.capture() as captured:
        console.print(plan_table(job.plan, job.estimate))
    assert ("weights are stored dense, and no smaller: `armor export" in captured.get()) == said


# --- names -------------------------------------------------------------------------------------------------------------------


def as_one(names: list[str], layers: list[str] | None = None) -> list[str]:
    return [name for name, _ in grouped(names, str, lambda name: name[-1], layers or [])]


def test_names_that_differ_by_numbers_are_one() -> None:
    names = [f"model.layers.{n}.{m}" for n in range(12) for m in ("q", "k")]
    assert as_one(names) == ["model.layers.*.q ×12", "model.layers.*.k ×12"]
    layers = [f"model.layers.{n}" for n in range(13)]
    assert as_one(names, layers) == ["model.layers.{0-11}.q ×12", "model.layers.{0-11}.k ×12"]
    assert as_one(names, layers[:12])[0] == "model.layers.*.q ×12"


def test_numbers_of_other_lists_are_told() -> None:
    experts = [f"layers.{n}.experts.{e}.up" for n in range(4) for e in (0, 1, 5)]
    assert as_one(experts) == ["layers.*.experts.{0-1,5}.up ×12"]
    towers = [f"{t}.block.{n}.layer.1.fc" for t in ("encoder", "decoder") for n in range(2)]
    assert as_one(
        towers, [f"{t}.block.{n}" for t in ("encoder", "decoder") for n in range(3 if t[0] == "d" else 2)]
    ) == [
        "encoder.block.*.layer.1.fc ×2",
        "decoder.block.{0-1}.layer.1.fc ×2",
    ]
    assert as_one(["a.0.b1", "lm_head", "a.1.b1", "a.1.b2"]) == ["a.*.b1 ×2", "lm_head", "a.1.b2"]


def test_what_names_have_in_common() -> None:
    assert common_parent(["model.layers.*.q ×2", "model.layers.0.k", "model.layers.{0-1}.v ×2"]) == "model"
    assert common_parent(["model.layers.0.q", "model.head"]) == "model"
    assert common_parent(["layers.0.q", "layers.0.k"]) == ""
    assert common_parent(["model.q"]) == common_parent([]) == ""


# --- 80 columns --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize("name", builtin_recipes(builtin_recipe_dir()))
def test_plans_fit_80_columns(name: str, every: bool, tmp_path: Path) -> None:
    job = prepare(read_recipe(name, model=planned_model(read_recipe(name).model.id, tmp_path)))
    job = replace(job, plan=replace(job.plan, model="builtin:stdlib-llama"))
    console = Console(width=80, no_color=True)
    with console.capture() as captured:
        console.print(plan_table(job.plan, job.estimate, every=every))
    lines = [line.rstrip() for line in captured.get().splitlines()]
    assert max(map(len, lines)) <= 80
    names = [line.split() for line in lines if line.startswith("  layers.")][: len(job.plan.modules)]
    assert not any("…" in " ".join(words) for words in names)
    assert all(len(words) > 5 and words[0].startswith("layers.") and words[0].endswith("_proj") for words in names)
    if every:
        assert sorted(f"model.{words[0]}" for words in names) == sorted(row.name for row in job.plan.modules)
    else:
        kinds = {(row.modifier, row.name.rpartition(".")[2]) for row in job.plan.modules}
        assert len(names) == len(kinds)
        assert sum(int(words[1][1:]) for words in names) == len(job.plan.modules)
