"""`armor sweep`: what is refused, what runs, what is not run again, and what is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from armor_recipes.cli import apart
from armor_recipes.cli.sweep_tables import result_table
from armor_recipes.errors import ResourceError
from armor_recipes.recipe import Recipe
from armor_recipes.recipe.sweep import SweepSpec
from armor_recipes.report.sweep import with_fronts
from armor_recipes.run import prepare
from armor_recipes.run import sweep as sweeping
from tests.support.browser import CHROMIUM, browser
from tests.support.commands import Shell, finished, forked
from tests.support.engine import recipe
from tests.support.forks import Forks
from tests.support.pages import ROOT, blocks, planned_model
from tests.support.tokenizers import byte_tokenizer

BLOCK = "prune_stage.armor_modifiers.ARMORModifier.block_size"
ITERATIONS = "prune_stage.armor_modifiers.ARMORModifier.iterations"
GRID: dict[str, Any] = {BLOCK: [4, 8]}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs are made in this process; their names as they begin."""
    ran: list[str] = []

    def run(made: Recipe, device: str, overwrite: bool, fresh: bool, observer: Any) -> None:
        ran.append(str(made.modifiers[0].config.block_size))  # type: ignore[attr-defined]
        sweeping.work_here(made, device, overwrite, fresh=fresh, observer=observer)

    monkeypatch.setattr(apart, "run_apart", run)
    return ran


def write_sweep(folder: Path, model: Path, **fields: Any) -> Path:
    """A recipe and a sweep of it beside each other."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(model, "unused"), sort_keys=False))
    file = folder / "sweep.yaml"
    fields = {"recipe": "recipe.yaml", "grid": GRID, "output": "out", **fields}
    file.write_text(yaml.safe_dump({k: v for k, v in fields.items() if v is not None}, sort_keys=False))
    return file


def lettered(llama: Path, folder: Path) -> Path:
    """A model with a tokenizer."""
    byte_tokenizer(end=False).save_pretrained(shutil.copytree(llama, folder / "m"))
    return folder / "m"


def evaluation(folder: Path, *measures: str) -> dict[str, Any]:
    """Measures on letters whose tokens the model has."""
    (folder / "letters.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 9)
    whole = {"perplexity": {}, "fidelity": {"samples": 4}}
    return {name: {"dataset": "./letters.txt", "sequence_length": 32, **whole[name]} for name in measures}


def result(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((folder / "out" / "sweep.json").read_text())["points"]
    return rows


def test_each_point_runs_once_and_is_a_row(llama: Path, tmp_path: Path, shell: Shell, here: list[str]) -> None:
    file = write_sweep(tmp_path, llama)
    done = shell("armor", "sweep", file)
    assert (done.code, here) == (0, ["4", "8"]), done.err
    rows = result(tmp_path)
    assert [(row["name"], row["values"]) for row in rows] == [
        ("block_size=4", {BLOCK: 4}),
        ("block_size=8", {BLOCK: 8}),
    ]
    assert rows[0]["size_after_bytes"] < rows[1]["size_after_bytes"]
    assert rows[0]["factor_overhead"] < rows[1]["factor_overhead"]
    assert rows[0]["front"][0] == "size"  # the smallest
    for row in rows:
        folder = tmp_path / "out" / row["reports"]
        manifest, report = (json.loads((folder / name).read_text()) for name in ("armor_manifest.json", "report.json"))
        assert row["loss"] == pytest.approx(
            sum(m["stored_loss"] for m in manifest["modules"].values()) / len(manifest["modules"])
        )
        assert (row["seconds"], row["size_after_bytes"]) == (report["seconds"], report["size_after_bytes"])
        assert row["name"] in (folder / "report.html").read_text(encoding="utf-8")
    assert not (tmp_path / "out" / "models").exists()

    again = shell("armor", "sweep", file, "--json")
    assert (again.code, len(here)) == (0, 2)
    assert json.loads(again.out)["points"] == rows
    assert again.err.count("was run before") == 2


def test_more_points_and_other_values_run_what_is_new(
    llama: Path, tmp_path: Path, shell: Shell, here: list[str]
) -> None:
    file = write_sweep(tmp_path, llama, grid={BLOCK: [8]})
    assert shell("armor", "sweep", file).code == 0
    write_sweep(tmp_path, llama, grid={BLOCK: [16, 8]})
    planned = shell("armor", "sweep", file, "--plan")
    rows = {line.split()[0]: "done" in line for line in planned.out.splitlines() if "block_size=" in line}
    assert rows == {"block_size=16": False, "block_size=8": True}, planned.out
    assert "1 of 2 points, one after the other" in planned.out
    points = json.loads(shell("armor", "sweep", file, "--plan", "--json").out)
    assert [point["done"] for point in points["points"]] == [False, True]
    assert points["cpu_seconds"] == points["points"][0]["estimate"]["cpu_seconds"]
    kept = json.loads(shell("armor", "sweep", file, "--plan", "--json", "--keep-models").out)
    assert [point["done"] for point in kept["points"]] == [False, False]
    assert shell("armor", "sweep", file).code == 0
    assert here == ["8", "16"]
    assert shell("armor", "sweep", file, "--set", f"{ITERATIONS}=2").code == 0
    assert here == ["8", "16", "16", "8"]
    assert shell("armor", "sweep", file).code == 0  # those of before are still known
    assert len(here) == 4


def test_models_are_kept_where_it_is_asked_for(llama: Path, tmp_path: Path, shell: Shell, here: list[str]) -> None:
    file = write_sweep(tmp_path, llama)
    assert shell("armor", "sweep", file).code == 0
    assert shell("armor", "sweep", file, "--keep-models").code == 0
    assert here == ["4", "8", "4", "8"]
    assert shell("armor", "sweep", file, "--keep-models").code == 0
    assert len(here) == 4
    for row in result(tmp_path):
        assert shell("armor", "verify", tmp_path / "out" / row["model"]).code == 0
    (tmp_path / "out" / result(tmp_path)[0]["model"] / "model.safetensors").unlink()
    assert shell("armor", "sweep", file, "--keep-models").code == 0
    assert here[4:] == ["4"]
    del here[4:]
    shutil.rmtree(tmp_path / "out" / "runs")  # as a kill leaves it before the reports are kept
    assert shell("armor", "sweep", file, "--keep-models").code == 0
    assert len(here) == 4
    assert [row["status"] for row in result(tmp_path)] == ["done", "done"]


def test_named_points_and_a_grid_are_combined(llama: Path, tmp_path: Path, shell: Shell) -> None:
    other = {"targets": [r"re:.*mlp\..*_proj$"]}
    points = {
        "as it is": {},
        "NoWag": {
            "remove": "prune_stage.armor_modifiers.ARMORModifier",
            "prune_stage.armor_modifiers.NoWagModifier": other,
        },
    }
    file = write_sweep(
        tmp_path, llama, points=points, grid={"calibration.seed": [0, 1]}, set={"calibration.samples": 3}
    )
    planned = json.loads(shell("armor", "sweep", file, "--plan", "--json").out)["points"]
    assert [point["name"] for point in planned] == [
        "as it is, seed=0",
        "as it is, seed=1",
        "NoWag, seed=0",
        "NoWag, seed=1",
    ]
    assert [point["totals"]["modules"] for point in planned] == [14, 14, 6, 6]
    assert planned[3]["values"] == {**points["NoWag"], "calibration.seed": 1}
    assert all(point["estimate"]["cpu_seconds"] > 0 for point in planned)
    assert not (tmp_path / "out").exists()


def test_a_gate_is_a_row_and_a_failure_an_exit_code(
    llama: Path, tmp_path: Path, shell: Shell, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = evaluation(tmp_path, "perplexity")
    gate = {"gate": {"evaluation": {**measured, "max_perplexity_ratio": 1e-6}}, "as it is": {}}
    file = write_sweep(tmp_path, lettered(llama, tmp_path), grid=None, points=gate)
    run = apart.run_apart

    def failing(made: Recipe, *rest: Any) -> None:
        if made.evaluation is None:
            raise ResourceError("no memory")
        run(made, *rest)

    monkeypatch.setattr(apart, "run_apart", failing)
    done = shell("armor", "sweep", file)
    assert done.code == 7
    assert "1 of 2 points failed, first as it is: no memory" in done.err
    rejected, failed = result(tmp_path)
    assert (rejected["status"], failed["status"], failed["exit_code"]) == ("rejected", "failed", 7)
    assert rejected["error"].startswith("perplexity on")
    assert str(tmp_path) not in rejected["error"]
    assert rejected["perplexity_after"] > 1e-6 * rejected["perplexity_before"]
    assert "gate: rejected: perplexity" in done.out
    assert not (tmp_path / "out" / "models").exists()
    monkeypatch.setattr(apart, "run_apart", run)
    assert shell("armor", "sweep", file).code == 0  # what failed is run again, what was rejected is not
    assert len(here) == 2
    assert [row["status"] for row in result(tmp_path)] == ["rejected", "done"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"grid": {BLOCK: [8, -4], ITERATIONS: [True]}},
            ("sweep.yaml:5: prune_stage.armor_modifiers.ARMORModifier.block_size: must", "sweep.yaml:7: "),
        ),
        (
            {"grid": {"prune_stage.armor_modifiers.ARMORModifier.blocks": [8]}},
            ("sweep.yaml:4: prune", "blocks: unknown key; nearest valid key: block_size"),
        ),
        ({"grid": {BLOCK: 8}}, ("sweep.yaml:3: grid", "must be a list (value 8)")),
        ({"grid": {BLOCK: [8, 8]}}, ("sweep.yaml:3: grid", "block_size=8 is there twice")),
        ({"grid": {"evaluation.max_perplexity_ratio": [2, 2.0]}}, ("max_perplexity_ratio=2.0 is there twice",)),
        ({"grid": {"a..b": [8]}}, ("a..b: is no key of a recipe",)),
        ({"grid": {"calibration.seed": list(range(1001))}}, ("1,001 points; a sweep has at most 1,000",)),
        ({"grid": None}, ("no point; give `grid`, `points` or both",)),
        ({"set": {BLOCK: 4}}, ("sweep.yaml:4: ", "block_size: is given at", "sweep.yaml:8, too; keep one of the two")),
        ({"set": {"output.path": "x"}}, ("sweep.yaml:8: output.path: is given at", "sweep.yaml:6, too; keep one")),
        ({"points": {"one": {"output": {"path": "x"}}}}, ("output.path: is given at",)),
        ({"recipe": "nowhere.yaml"}, ("sweep.yaml:1: recipe: no such file",)),
        ({"recipe": "sweep.yaml"}, ("sweep.yaml:1: recipe: is a sweep, and no recipe",)),
        ({"recipe": None}, ("recipe: required, but missing; name a recipe file",)),
        ({"output": None}, ("output: required, but missing",)),
        ({"grids": {}}, ("grids: unknown key; nearest valid key: grid",)),
        ({"points": {"one": {"calibration.dataset.x": 1}}}, ("calibration.dataset.x: cannot be set",)),
    ],
)
def test_what_is_wrong_is_told_with_its_line_before_anything_runs(
    llama: Path, tmp_path: Path, shell: Shell, here: list[str], fields: dict[str, Any], said: tuple[str, ...]
) -> None:
    done = shell("armor", "sweep", write_sweep(tmp_path, llama, **fields))
    assert (done.code, done.out, here) == (2, "", [])
    for words in said:
        assert words in done.err
    assert not (tmp_path / "out").exists()


def test_plans_and_data_of_all_points_are_checked_first(
    llama: Path, tmp_path: Path, shell: Shell, here: list[str]
) -> None:
    done = shell("armor", "sweep", write_sweep(tmp_path, llama, grid={BLOCK: [8, 7, 5]}))
    assert (done.code, here) == (3, [])
    assert "point block_size=7: " in done.err
    assert "point block_size=5: " in done.err
    done = shell(
        "armor",
        "sweep",
        write_sweep(tmp_path, llama, grid={"calibration.dataset": ["builtin:random-tokens", "./none.txt"]}),
    )
    assert (done.code, here) == (5, [])
    assert f"{tmp_path}/none.txt" in done.err
    done = shell("armor", "sweep", write_sweep(tmp_path, llama), "--set", f"{BLOCK}=8")
    assert (done.code, here) == (2, [])
    assert "leave --set out" in done.err


def test_a_folder_of_something_else_is_left_alone(llama: Path, tmp_path: Path, shell: Shell, here: list[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    done = shell("armor", "sweep", write_sweep(tmp_path, llama))
    assert (done.code, here) == (2, [])
    assert "is of no sweep" in done.err
    (tmp_path / "out" / "sweep.json").write_text('{"mine": 1}')
    assert shell("armor", "sweep", tmp_path / "sweep.yaml").code == 2
    assert (tmp_path / "out" / "sweep.json").read_text() == '{"mine": 1}'
    assert shell("armor", "sweep", tmp_path / "sweep.yaml", "--output", tmp_path / "sweep.yaml").code == 2
    assert shell("armor", "sweep", tmp_path / "sweep.yaml", "--output", "").code == 2
    done = shell("armor", "sweep", tmp_path / "sweep.yaml", "--output", "/proc/x")
    assert (done.code, "/proc" in done.err, "end at" in done.err) == (2, True, False), done.err


def test_a_sweep_is_not_written_over_by_its_results(llama: Path, tmp_path: Path, shell: Shell, here: list[str]) -> None:
    file = write_sweep(tmp_path, llama, output=".").rename(tmp_path / "sweep.json")
    text = file.read_text()
    done = shell("armor", "sweep", file)
    assert (done.code, here, file.read_text()) == (2, [], text), done.err


def test_what_was_kept_and_is_damaged_is_told(llama: Path, tmp_path: Path, shell: Shell, here: list[str]) -> None:
    file = write_sweep(tmp_path, llama)
    assert shell("armor", "sweep", file).code == 0
    folder = tmp_path / "out" / result(tmp_path)[0]["reports"]
    report = json.loads((folder / "report.json").read_text())
    for seconds in ("12 s", float("nan")):
        (folder / "report.json").write_text(json.dumps({**report, "cpu_seconds": seconds}))
        done = shell("armor", "sweep", file)
        assert (done.code, "Traceback" in done.err) == (5, False), done.err
        assert f"{folder} does not hold what a run writes" in done.err
        assert "remove it, and it is run again" in done.err
    (folder / "report.json").unlink()
    assert shell("armor", "sweep", file).code == 5
    (folder / "point.json").write_text(json.dumps({**json.loads((folder / "point.json").read_text()), "status": ["x"]}))
    assert shell("armor", "sweep", file).code == 0  # a record that says nothing is none
    assert here == ["4", "8", "4"]


def test_the_table_fits_80_columns(
    llama: Path, tmp_path: Path, shell: Shell, here: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = {"evaluation": evaluation(tmp_path, "perplexity", "fidelity")}
    file = write_sweep(tmp_path, lettered(llama, tmp_path), points={"a name that is rather long": measured})
    monkeypatch.setenv("COLUMNS", "80")
    for words in ((), ("--plan",)):
        done = shell("armor", "sweep", file, *words)
        assert done.code == 0, done.err
        assert max(map(len, done.out.split("dense:")[0].splitlines())) <= 80
    head = shell("armor", "sweep", file).out.splitlines()[0].split()
    assert head == ["point", "perplexity", "agreement", "size", "factors", "CPU", "time", "memory", "best"]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
@pytest.mark.parametrize(("width", "dark"), [(1280, False), (360, True)])
def test_the_page_in_a_browser(
    llama: Path, tmp_path: Path, shell: Shell, here: list[str], width: int, dark: bool
) -> None:
    measured = evaluation(tmp_path, "perplexity", "fidelity")
    points = {"<b>one</b>": {}, "gate": {"evaluation.max_perplexity_ratio": 1e-6}}
    file = write_sweep(tmp_path, lettered(llama, tmp_path), points=points, set={"evaluation": measured})
    assert shell("armor", "sweep", file).code == 0
    page = tmp_path / "out" / "sweep.html"
    assert str(tmp_path) not in page.read_text(encoding="utf-8")
    with browser(tmp_path / "profile") as tab:
        tab.show(page, width=width, dark=dark)
        assert tab.complaints == []
        assert tab.requests == [page.resolve().as_uri()]
        assert tab.ask("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0
        assert tab.ask("document.querySelectorAll('.chart svg').length") == 3
        names = tab.ask(
            "[...document.querySelectorAll('#points > .scroll tbody th')].map((cell) => cell.textContent).join('\\n')"
        )
        assert names.split("\n") == [row["name"] for row in result(tmp_path)]
        links = tab.ask(
            "[...document.querySelectorAll('#points tbody a')].map((link) => link.getAttribute('href')).join()"
        )
        assert all((tmp_path / "out" / link).is_file() for link in links.split(","))
        assert tab.ask("document.documentElement.dataset.theme") == ("dark" if dark else "light")


def test_the_tables_of_the_results_say_the_same(llama: Path, tmp_path: Path, shell: Shell, here: list[str]) -> None:
    assert shell("armor", "sweep", write_sweep(tmp_path, llama)).code == 0
    lines = (tmp_path / "out" / "sweep.md").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("| point | mean loss | size | factors, % of dense | time |")
    for row, line in zip(result(tmp_path), lines[2:], strict=True):
        assert line.startswith(f"| {row['name']} | ".replace("_", r"\_"))
        assert f" {row['size_after_bytes'] / 1e6:.2f} MB |" in line


def test_fronts() -> None:
    figures = {"a": (10.0, 5, 3.0), "b": (9.0, 5, 9.0), "c": (11.0, 4, 1.0), "d": (11.0, 9, 9.5), "e": (10.0, 5, 3.0)}
    rows = [
        {
            "name": name,
            "status": "done",
            "resumed": False,
            "perplexity_after": q,
            "size_after_bytes": size,
            "cpu_seconds": time,
            "device": "cpu",
        }
        for name, (q, size, time) in figures.items()
    ]
    rows.append({"name": "f", "status": "failed"})
    found = {row["name"]: row["front"] for row in with_fronts(rows)}
    assert found == {
        "a": ["time"],
        "b": ["size", "time"],
        "c": ["size", "time"],
        "d": [],
        "e": ["time"],
        "f": [],
    }
    found = {row["name"]: row["front"] for row in with_fronts([{**row, "resumed": row["name"] == "c"} for row in rows])}
    assert found["c"] == ["size"]


def test_what_the_dense_model_beats_is_not_best_at_size() -> None:
    figures = {"small": (41.0, 50), "large": (39.0, 120), "better": (38.0, 120)}
    rows = [
        {
            "name": name,
            "status": "done",
            "resumed": False,
            "device": "cpu",
            "perplexity_before": 38.8,
            "perplexity_after": after,
            "size_before_bytes": 100,
            "size_after_bytes": size,
            "cpu_seconds": 1.0,
        }
        for name, (after, size) in figures.items()
    ]
    found = {row["name"]: row["front"] for row in with_fronts(rows)}
    assert found == {"small": ["size"], "large": [], "better": ["size", "time"]}


def test_an_interrupted_sweep_goes_on(llama: Path, tmp_path: Path, forks: Forks) -> None:
    adam = {"prune_stage.armor_modifiers.ARMORModifier.solver": "adam"}
    file = write_sweep(tmp_path, llama, grid={ITERATIONS: [10**7]}, set=adam)
    running = forked(forks, "armor", "sweep", file, cwd=tmp_path)
    for line in running.stderr:
        if "stage prune_stage" in line:
            break
    running.send_signal(signal.SIGTERM)
    done = finished(running)
    assert (done.code, "Traceback" in done.err) == (143, False), done.err
    assert "0 of 1 points are done: the same command goes on from there" in done.err
    assert [row["status"] for row in result(tmp_path)] == ["pending"]
    assert not list((tmp_path / "out").rglob("*.safetensors"))
    file.write_text(file.read_text().replace(str(10**7), "3"))
    done = finished(forked(forks, "armor", "sweep", file, "--json", cwd=tmp_path))
    assert done.code == 0, done.err
    (row,) = json.loads(done.out)["points"]
    assert row["status"] == "done"
    assert row["peak_memory_bytes"] > row["peak_anonymous_memory_bytes"] > 0


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc: who the child is cannot be asked")
def test_a_run_that_the_system_ends_is_a_row(llama: Path, tmp_path: Path, forks: Forks) -> None:
    adam = {"prune_stage.armor_modifiers.ARMORModifier.solver": "adam"}
    file = write_sweep(tmp_path, llama, grid={ITERATIONS: [10**7, 2]}, set=adam)
    running = forked(forks, "armor", "sweep", file, cwd=tmp_path)
    for line in running.stderr:
        if "stage prune_stage" in line:
            break
    tasks = Path(f"/proc/{running.pid}/task").glob("*/children")
    children = [child for task in tasks for child in task.read_text().split()]
    (run,) = [child for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]
    os.kill(int(run), signal.SIGKILL)
    done = finished(running)
    assert done.code == 7
    assert "the run's process was ended by signal 9 (SIGKILL), as the system does where memory runs out" in done.err
    assert [row["status"] for row in result(tmp_path)] == ["failed", "done"]


def test_check_and_schema_know_sweeps(llama: Path, tmp_path: Path, shell: Shell) -> None:
    file = write_sweep(tmp_path, llama)
    assert shell("armor", "check", file).out == f"{file}: 2 points, all well formed\n"
    write_sweep(tmp_path, llama, grid={BLOCK: [8, -4]})
    done = shell("armor", "check", file)
    assert (done.code, done.out) == (2, "")
    assert "sweep.yaml:5: " in done.err
    schema = json.loads(shell("armor", "schema", "--sweep").out)
    assert (schema["required"], list(schema["properties"])) == (["recipe", "output"], list(SweepSpec.model_fields))
    assert all(field["title"] and field["description"] for field in schema["properties"].values())


def test_the_page_of_the_docs_has_every_key(llama: Path, tmp_path: Path, shell: Shell, here: list[str]) -> None:
    assert shell("armor", "sweep", write_sweep(tmp_path, llama)).code == 0
    page = (ROOT / "docs" / "sweeps.md").read_text(encoding="utf-8")
    keys = {*SweepSpec.model_fields, *result(tmp_path)[0]}
    assert not [key for key in keys if f"`{key}`" not in page]


SWEEPS = sorted((ROOT / "recipes" / "experiments").glob("*.yaml"))
LARGE = sorted((ROOT / "recipes" / "experiments").glob("*/*.yaml"))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda file: file.stem)
def test_sweeps_of_the_repository_plan(file: Path, tmp_path: Path) -> None:
    assert len(sweeping.plan_sweep(sweeping.read_sweep(file, output=str(tmp_path / "out")))) > 1


def test_the_sweep_of_the_page_is_one(tmp_path: Path) -> None:
    (tmp_path / "page.yaml").write_text(blocks("text", page=ROOT / "docs" / "sweeps.md")[0].text, encoding="utf-8")
    points = sweeping.read_sweep(tmp_path / "page.yaml").points
    assert len(points) == 9
    assert points[-1].name == "NoWag-P, seed=2"
    assert [entry.kind for entry in points[-1].recipe.modifiers] == ["NoWagModifier"]


@pytest.mark.parametrize("file", LARGE, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_sweeps_of_larger_models_plan(file: Path, tmp_path: Path) -> None:
    model = planned_model("fetched", tmp_path / "model")
    points = sweeping.read_sweep(file, overrides=(f"model.id={model}",)).points
    assert len(points) > 2
    assert all(len({module.name for module in prepare(point.recipe).plan.modules}) == 210 for point in points)


def test_losses_are_shown_where_not_all_points_have_a_perplexity() -> None:
    figures = {"agreement": None, "size_after_bytes": 2**20, "factor_overhead": 0.1, "cpu_seconds": 3.0, "seconds": 2.0}
    common = {**figures, "status": "done", "front": [], "resumed": False, "device": "cpu", "loss": 0.25}
    rows = [{**common, "name": name, "perplexity_after": value} for name, value in (("a", 40.0), ("b", None))]
    heads = [[str(column.header) for column in result_table(some).columns] for some in (rows, rows[:1], rows[1:])]
    assert [[head for head in found if head in ("perplexity", "loss")] for found in heads] == [
        ["perplexity", "loss"],
        ["perplexity"],
        ["loss"],
    ]
