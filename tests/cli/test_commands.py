"""What the commands print, and where."""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from armor_recipes.cli.tables import size
from armor_recipes.cli.view import WorkDone, progress_view
from armor_recipes.events import (
    EvaluationProgressed,
    Event,
    LayerStarted,
    ModuleFinished,
    PhaseStarted,
    SolveProgressed,
    UnitRefined,
    WorkEstimated,
)
from armor_recipes.recipe import builtin_recipes
from armor_recipes.run import apply, prepare
from armor_recipes.run.job import builtin_recipe_dir, read_recipe
from tests.support.commands import Done, Shell, finished, process, write_recipe
from tests.support.engine import ARMOR, ATTENTION, MLP

RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def file(llama: Path, tmp_path: Path) -> Path:
    return write_recipe(tmp_path, llama)


# --- armor-apply -----------------------------------------------------------------------------------------------------------


def test_a_plan_is_a_table_and_the_resolved_recipe(shell: Shell, file: Path, tmp_path: Path) -> None:
    done = shell("armor-apply", file, "--plan", "--all")
    assert (done.code, done.err) == (0, "")
    _, heading, _, modifier, *modules = done.out.splitlines()[:18]
    assert heading.split() == ["module", "of", "model", "shape", "block", "blocks", "before", "after", "factors"]
    assert modifier.strip() == "ARMORModifier, packed"
    assert all(line.startswith("  layers.") for line in modules)
    assert re.search(r"\n  layers\.0\.mlp\.up_proj +64x32 +8x8 +8\+4 +4096 +3840 +37\.5 %\n", done.out)
    assert "14 weights:" in done.out
    assert re.search(r"\nResolved recipe\nsha256 [0-9a-f]{64}\nmodel:", done.out)
    assert "block_size: 8" in done.out
    assert not (tmp_path / "out").exists()


def test_a_plan_has_a_line_for_each_kind_of_module(shell: Shell, file: Path) -> None:
    done = shell("armor-apply", file, "--plan")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"\n  layers\.\*\.mlp\.up_proj ×2 +64x32 +8x8 +8\+4 +8\.19 kB +7\.68 kB +37\.5 %\n", done.out)
    assert done.out.count("layers.*.") == 7
    done = shell("armor-apply", file, "--all")
    assert (done.code, "--all lists the modules of a plan: give --plan, too" in done.err) == (2, True)


def test_a_plan_as_json(shell: Shell, file: Path) -> None:
    done = shell("armor-apply", file, "--plan", "--json")
    data = json.loads(done.out)
    assert (done.code, done.err) == (0, "")
    assert data["plan"]["totals"]["modules"] == len(data["plan"]["modules"]) == 14
    assert data["plan"]["modules"][0]["overhead_percent"] > 0
    assert data["recipe"]["calibration"]["samples"] == 5


def test_a_stream_is_told_by_the_summary_and_the_manifest(shell: Shell, tmp_path: Path) -> None:
    rows = [{"text": f"Return row {row} of the list. " * 40} for row in range(50)]
    rows += [{"text": "Short."}, {"text": " "}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    drawn = {"stream": True, "documents": "truncated", "samples": {"at_most": 99}, "sequence_length": 32}
    recipe = {
        "model": "builtin:stdlib-llama",
        "calibration": {"dataset": "rows.jsonl", **drawn},
        "prune_stage": {"prune_modifiers": {"NoWagModifier": {"targets": [r"re:.*layers\.0\..*q_proj$"]}}},
        "output": {"path": "out"},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = shell("armor-apply", "recipe.yaml")
    assert done.code == 0, done.err
    words = " ".join(done.out.split())
    assert "calibrated on 50 windows of 32 tokens, 99 asked for at most" in words
    assert "rows.jsonl (a stream, 1 empty rows passed over, 1 documents too short)" in words
    (row,) = json.loads((tmp_path / "out" / "armor_manifest.json").read_text())["calibration"]
    (source,) = row["sources"]
    assert row["documents"] == "truncated"
    assert {key: source[key] for key in ("stream", "documents", "empty", "short", "tokens", "available", "taken")} == {
        "stream": True,
        "documents": 51,
        "empty": 1,
        "short": 1,
        "tokens": 1600,
        "available": None,
        "taken": 50,
    }
    resolved = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["calibration"]
    assert {key: resolved[key] for key in drawn} == drawn


def test_set_and_output_change_the_plan(shell: Shell, file: Path) -> None:
    key = "prune_stage.armor_modifiers.ARMORModifier"
    words = ("--set", f"{key}.block_size=[4, 16]", "--set", f"{key}.ignore=[re:.*mlp.*]", "--output", "elsewhere")
    data = json.loads(shell("armor-apply", file, "--plan", "--json", *words).out)
    assert {tuple(m["block_size"]) for m in data["plan"]["modules"]} == {(4, 16)}
    assert len(data["plan"]["modules"]) == 8
    assert len(data["plan"]["ignored"]) == 6
    assert data["recipe"]["output"]["path"] == "elsewhere"


def test_several_files_are_laid_over_each_other(shell: Shell, file: Path, tmp_path: Path) -> None:
    (tmp_path / "more.yaml").write_text("calibration: {samples: 2}\noutput: {path: third}\n")
    data = json.loads(shell("armor-apply", file, "more.yaml", "--plan", "--json").out)
    assert (data["recipe"]["calibration"]["samples"], data["recipe"]["output"]["path"]) == (2, "third")


def test_plain_lines_when_there_is_no_terminal(shell: Shell, file: Path) -> None:
    done = shell("armor-apply", file)
    lines = done.err.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == [
        "preflight", "tokenize", "load weights", "compress", "stage prune_stage", "save", "verify",
    ]  # fmt: skip
    layers = [line for line in lines if line.startswith("  layer")]
    assert len(layers) == 2
    assert re.fullmatch(r"  layer 2/2: 7 modules, mean loss 0\.\d{5} -> 0\.\d{5}, \d+:\d\d left", layers[1])
    assert "\x1b" not in done.err + done.out
    assert "perplexity: not measured, the recipe has no `evaluation`" in done.out
    assert "14 modules in " in done.out
    assert "checkpoint: " in done.out


def test_quiet_says_nothing(shell: Shell, file: Path) -> None:
    done = shell("armor-apply", file, "--quiet")
    assert (done.code, done.out, done.err) == (0, "", "")


def test_the_result_as_json_and_the_report(shell: Shell, file: Path, tmp_path: Path) -> None:
    done = shell("armor-apply", file, "--json", "--report", "reports/deep/run.json")
    data = json.loads(done.out)
    assert len(data["modules"]) == 14
    assert data["perplexity_before"] is None
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert data["report"] == report == json.loads((tmp_path / "reports" / "deep" / "run.json").read_text())


def test_the_report_may_be_the_outputs_own(shell: Shell, file: Path, tmp_path: Path) -> None:
    assert shell("armor-apply", file, "--report", "out/report.json").code == 0
    assert json.loads((tmp_path / "out" / "report.json").read_text())["seconds"] > 0


def test_counts_and_dense_weights_are_in_the_summary(shell: Shell, tmp_path: Path) -> None:
    from tests.support.engine import make_model

    model = make_model("llama")
    model.model.layers[0].input_layernorm.weight.data[:3] = 0
    model.save_pretrained(tmp_path / "m")
    done = shell("armor-apply", write_recipe(tmp_path, tmp_path / "m"))
    assert "dead_channels: 9" in done.out


def test_a_run_that_matches_nothing_has_a_summary_too(shell: Shell, llama: Path, tmp_path: Path) -> None:
    file = write_recipe(tmp_path, llama, ARMORModifier={**ARMOR, "targets": ["re:.*experts.*"], "optional": True})
    done = shell("armor-apply", file)
    assert (done.code, "0 modules in" in done.out) == (0, True)
    assert shell("armor-apply", file, "--plan").code == 0


def test_square_brackets_are_no_markup(shell: Shell, file: Path, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "[bold]").mkdir()
    (tmp_path / "[bold]" / "[").symlink_to(llama)
    done = shell("armor-apply", file, "--plan", "--set", 'model.id="[bold]/["')
    assert (done.code, "Plan for [bold]/[:" in done.out) == (0, True)
    assert shell("armor-apply", file, "--quiet", "--output", "out/[/x]").code == 0
    done = shell("armor", "inspect", "out/[/x]")
    assert (done.code, "out/[/x]" in done.out) == (0, True)


# --- armor -------------------------------------------------------------------------------------------------------------------


def test_inspect_shows_what_was_planned(shell: Shell, llama: Path, tmp_path: Path) -> None:
    file = write_recipe(
        tmp_path, llama, ARMORModifier={**ARMOR, "targets": [ATTENTION]}, NoWagModifier={"targets": [MLP]}
    )
    plan = json.loads(shell("armor-apply", file, "--plan", "--json").out)["plan"]
    shell("armor-apply", file, "--quiet")
    found = json.loads(shell("armor", "inspect", "out", "--json").out)
    planned = {m["name"]: m["bytes_after"] for m in plan["modules"] if "attn" in m["name"]}
    assert {layer["name"]: layer["bytes"] for layer in found["layers"]} == planned
    assert found["bytes"] == plan["totals"]["bytes_after"] + plan["totals"]["untouched_bytes"]
    done = shell("armor", "inspect", "out", "--all")
    assert done.out.count("_proj") == 8
    assert "8 ARMOR layers" in done.out
    done = shell("armor", "inspect", "out")
    assert [line.split()[:2] for line in done.out.splitlines() if "_proj" in line] == [
        [f"layers.*.self_attn.{name}_proj", "×2"] for name in "koqv"
    ]
    assert "8 ARMOR layers" in done.out


def test_eval_of_a_checkpoint_is_what_the_run_measured(shell: Shell, tmp_path: Path) -> None:
    words: tuple[str, ...] = (
        "--set",
        "calibration={samples: 2, sequence_length: 16}",
        "--set",
        "evaluation.perplexity.windows=2",
    )
    modifier = "prune_stage.armor_modifiers.ARMORModifier"
    words += ("--set", f"{modifier}.targets=[re:.*layers.0.*proj]", "--set", f"{modifier}.iterations=1")
    result = json.loads(shell("armor-apply", "quickstart", *words, "--json", "--output", "out", "--quiet").out)
    flags = ("--windows", "2", "--sequence-length", "256", "--json")
    after = json.loads(shell("armor", "eval", "out", *flags).out)
    assert after["value"] == result["perplexity_after"]
    assert after["tokens"] == 2 * 255
    before = json.loads(shell("armor", "eval", "builtin:stdlib-llama", *flags).out)
    assert before["value"] == result["perplexity_before"] < after["value"]


def test_eval_in_words(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("A file is an object with a method.\n" * 50)
    done = shell(
        "armor", "eval", "builtin:stdlib-llama", "--dataset", "notes.txt", "--windows", "1", "--sequence-length", "32"
    )
    assert re.match(r"perplexity \d+\.\d{4}  \(31 tokens in 1 windows of ", done.out)


def test_schema_knows_every_modifier(shell: Shell) -> None:
    schema = shell("armor", "schema").out
    assert json.loads(schema)
    assert "ARMORModifier" in schema
    assert "NoWagModifier" in schema


def test_recipes_are_listed_and_printed(shell: Shell) -> None:
    shell.monkeypatch.setenv("COLUMNS", "80")
    listed = shell("armor", "recipes").out
    assert max(map(len, listed.splitlines())) <= 80
    told = dict(each.split("\n", 1) for each in re.split(r"\n(?=\S)", listed.rstrip()))
    assert sorted(told) == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    for name, text in told.items():
        words = " ".join(text.split())
        assert words.endswith((".", ":"))
        comment = (RECIPES / f"{name}.yaml").read_text().replace("\n#", "").lstrip("# ")
        assert comment.startswith(words)
    for path in RECIPES.glob("*.yaml"):
        assert shell("armor", "recipes", path.stem).out == path.read_text()


def test_convert_prints_a_recipe_and_tells_of_what_it_wrote(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "prune.py").write_text(
        "recipe = [WandaPruningModifier(targets=['re:.*mlp.*'], sparsity=0.5, requires_calibration_data=True)]"
    )
    done = shell("armor", "convert", str(tmp_path / "prune.py"))
    group = {"WandaPruningModifier": {"targets": ["re:.*mlp.*"], "sparsity": 0.5}}
    assert yaml.safe_load(done.out) == {"default_stage": {"default_modifiers": group}}
    assert "requires_calibration_data" in done.err


@pytest.mark.parametrize("verb", ["eval", "inspect", "export", "verify", "schema", "recipes", "convert", ""])
def test_every_verb_has_help(shell: Shell, verb: str) -> None:
    done = shell("armor", *([verb] if verb else []), "-h")
    assert (done.code, "Usage: armor" in done.out) == (0, True)


def test_the_examples_of_the_help_run(shell: Shell, file: Path, tmp_path: Path) -> None:
    from armor_recipes.cli import apply

    text = " ".join((apply._EPILOG).split("Exit codes")[0].split())
    examples = [example.strip() for example in text.removeprefix("Examples:").split("|")]
    assert len(examples) == 4
    for name in ("my.yaml", "base.yaml", "mine.yaml"):
        (tmp_path / name).write_text(file.read_text().replace(str(tmp_path / "out"), f"out/{name}"))
    for example in examples:
        words = [word.replace("block_size=32", "block_size=16") for word in example.split()]
        quick = ("--plan",) if "quickstart" in words else ()
        assert shell(*words, *quick, "--overwrite" if "--overwrite" not in words else "--quiet").code == 0, example


# --- recipes -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_loads_and_plans(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    assert path.read_text().startswith("# ")
    recipe = read_recipe(path)
    assert recipe.hash() == read_recipe(path.stem).hash()
    again = read_recipe(yaml.safe_load(recipe.resolved_yaml()))
    assert again.hash() == recipe.hash()
    if not recipe.model.id.startswith("builtin:") and not Path(recipe.model.id).exists():
        pytest.skip(f"{recipe.model.id} was not fetched; the recipe itself is checked above")
    plan = prepare(recipe).plan
    assert plan.modules
    assert {m.layer for m in plan.modules} == set(range(len(plan.layers)))


def test_the_built_in_recipes_are_those_of_the_folder() -> None:
    assert list(builtin_recipes(builtin_recipe_dir())) == sorted(path.stem for path in RECIPES.glob("*.yaml"))


# --- the live view -------------------------------------------------------------------------------------------------------------

EVENTS: list[Event] = [
    PhaseStarted("evaluate before"),
    EvaluationProgressed(1, 2),
    PhaseStarted("stage [/odd]_stage"),
    LayerStarted("s", 0, 2),
    SolveProgressed("model.layers.0.q", 1, 3, 0.25),
    ModuleFinished("model.layers.0.q", 0.3, 0.125, 0.1, 0.5),
    ModuleFinished("model.layers.0.k", 0.5, 0.25, 0.1, 0.75),
    LayerStarted("s", 1, 2),
    ModuleFinished("model.layers.1.q", 0.3, 0.2, 0.1, 1.0),
    PhaseStarted("save"),
]


@pytest.mark.parametrize("terminal", [True, False])
def test_views_take_every_event(terminal: bool, tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w") as screen:
        console = Console(file=screen, force_terminal=terminal, width=120)
        with progress_view(console, quiet=False) as view:
            for event in EVENTS:
                view(event)
    text = (tmp_path / "screen").read_text()
    if terminal:
        assert "100%" in text
    else:
        assert "  layer 1/2: 2 modules, mean loss 0.40000 -> 0.18750, " in text
        assert text.splitlines()[-1] == "save"
        assert "  layer 2/2: 1 modules" in text


def test_a_plain_view_is_not_silent_for_more_than_a_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("armor_recipes.cli.view.time.monotonic", lambda: clock[0])
    events: list[tuple[float, Event]] = [
        (0, WorkEstimated({"compress": 100.0}, 0.0, {})),
        (0, PhaseStarted("compress")),
        (59, SolveProgressed("model", 1, 10, 0.5, 0.1)),
        (61, SolveProgressed("model", 2, 10, 0.25, 0.2)),
        (62, SolveProgressed("model", 3, 10, 0.125, 0.3)),
        (200, EvaluationProgressed(1, 2, "perplexity")),
    ]
    with (
        (tmp_path / "screen").open("w") as screen,
        progress_view(Console(file=screen, force_terminal=False), quiet=False) as view,
    ):
        for clock[0], event in events:
            view(event)
    assert (tmp_path / "screen").read_text().splitlines() == [
        "compress",
        "  model: 2 of 10, loss 0.25000, 4:04 left",
        "  perplexity: 1 of 2, 7:46 left",
    ]


def test_the_live_view_names_the_phase_that_trains(tmp_path: Path) -> None:
    with (tmp_path / "screen").open("w") as screen:
        console = Console(file=screen, force_terminal=True, width=120)
        with progress_view(console, quiet=False) as view:
            for event in [*EVENTS[:-1], PhaseStarted("TrainingModifier"), SolveProgressed("model", 1, 2, 0.5)]:
                view(event)
            view(UnitRefined("model", 0.5, 0.25, 2, 0.1, 1.0))
    lines = [line for line in (tmp_path / "screen").read_text().splitlines() if "model  loss 0.50000" in line]
    assert lines
    assert all("TrainingModifier" in line for line in lines)


def test_a_quiet_view_draws_nothing(tmp_path: Path) -> None:
    with (
        (tmp_path / "screen").open("w") as screen,
        progress_view(Console(file=screen, force_terminal=True), quiet=True) as view,
    ):
        for event in EVENTS:
            view(event)
    assert (tmp_path / "screen").read_text() == ""


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (6_560_000, "6.56 MB"), (2.5e9, "2.5 GB"), (3e12, "3 TB")],
)
def test_sizes(count: float, text: str) -> None:
    assert size(count) == text


# --- in a process of its own ---------------------------------------------------------------------------------------------------


def test_no_other_librarys_bar_is_drawn(file: Path, tmp_path: Path) -> None:
    done = finished(process("armor-apply", file, "--quiet", cwd=tmp_path))
    assert (done.code, done.out, done.err) == (0, "", "")


def test_help_needs_neither_torch_nor_an_encoding(tmp_path: Path) -> None:
    commands: list[Any] = [("armor-apply", "--help"), ("armor", "--help")]
    running = [
        process(*words, cwd=tmp_path, PYTHONIOENCODING="ascii", PYTHONPROFILEIMPORTTIME="1") for words in commands
    ]
    for done in map(finished, running):
        assert done.code == 0
        assert "Usage" in done.out
        imported = {line.rsplit("|", 1)[-1].strip() for line in done.err.splitlines()}
        assert not {"torch", "transformers", "compressed_tensors"} & imported


@pytest.mark.parametrize(
    "words",
    [("armor", "schema"), pytest.param(("armor-apply", "{file}", "--plan"), marks=pytest.mark.slow)],
    ids=["schema", "plan"],
)
def test_a_reader_that_is_gone_is_no_error(file: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    with process(*(word.format(file=file) for word in words), cwd=tmp_path) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert (running.stderr.read(), running.wait(60)) == ("", 0)


def test_the_whole_bar_counts_evaluation_and_ends() -> None:
    work = WorkDone()
    phases = {"evaluate before": 20.0, "measure": 0.0, "compress": 50.0, "evaluate after": 20.0}
    events: list[tuple[Event, float]] = [
        (WorkEstimated(phases, 10.0, {"perplexity": 300, "fidelity": 100}), 0.0),
        (PhaseStarted("load weights"), 0.0),
        (PhaseStarted("evaluate before"), 10 / 3),
        (EvaluationProgressed(1, 2, "perplexity"), 10 / 3 + 20 * 3 / 8),
        (EvaluationProgressed(2, 2, "perplexity"), 10 / 3 + 20 * 3 / 4),
        (EvaluationProgressed(1, 4, "fidelity"), 10 / 3 + 20 * (3 / 4 + 1 / 16)),
        (PhaseStarted("compress"), 10 / 3 + 20),
        (ModuleFinished("m", 0.3, 0.1, 0.1, 0.5), 10 / 3 + 20 + 25),
        (SolveProgressed("n", 2, 3, 0.1), 10 / 3 + 20 + 25),
        (SolveProgressed("model", 1, 2, 0.1, 0.75), 10 / 3 + 20 + 37.5),
        (PhaseStarted("evaluate after"), 10 / 3 + 20 + 50),
        (EvaluationProgressed(2, 2, "perplexity"), 10 / 3 + 20 + 50 + 15),
        (PhaseStarted("save"), 10 / 3 + 90),
        (PhaseStarted("verify"), 20 / 3 + 90),
    ]
    for event, percent in events:
        work(event)
        assert work.share == pytest.approx(percent / 100)


def test_a_run_tells_what_it_is_thought_to_take(tmp_path: Path) -> None:
    seen: list[Event] = []
    modifier = "prune_stage.armor_modifiers.ARMORModifier"
    words = [
        f"{modifier}.targets=[re:.*layers.0.*proj]",
        f"{modifier}.iterations=1",
        "evaluation.perplexity.windows=16",
    ]
    words += ["calibration={samples: 2, sequence_length: 16}"]
    result = apply("quickstart", overrides=words, output=tmp_path / "out", observer=seen.append)
    (estimated,) = (event for event in seen if isinstance(event, WorkEstimated))
    assert estimated.measures == {"perplexity": 16 * 256}
    assert estimated.phases["evaluate before"] == estimated.phases["evaluate after"] > 0
    assert sum(estimated.phases.values()) + estimated.ends == pytest.approx(result.estimate.cpu_seconds, abs=0.5)
    work, shares = WorkDone(), []
    for event in seen:
        work(event)
        shares.append(work.share)
    assert shares == sorted(shares)
    assert 0.6 < shares[-1] <= 1


@pytest.mark.parametrize("name", ["armor", "armor-apply"])
def test_the_release(name: str, shell: Shell) -> None:
    assert shell(name, "--version") == Done(0, f"armor-recipes {version('armor-recipes')}\n", "")
