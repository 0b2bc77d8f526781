"""`--metrics`: what is logged, and trackers that are missing, fail, or are not asked for."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from armor_recipes.events import ModuleFinished, SolveProgressed, UnitRefined
from armor_recipes.report.metrics import Metrics, metrics_to, open_sink
from tests.support.commands import Shell, surroundings, write_recipe

SMALL = ("calibration={samples: 2, sequence_length: 16}", "evaluation.perplexity.windows=2")
MODIFIER = "prune_stage.armor_modifiers.ARMORModifier"


class Tracker:
    """What wandb and trackio look like from here."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []

    def init(self, project: str) -> None:
        self.calls.append(("init", project))

    def log(self, values: Mapping[str, float]) -> None:
        self.calls.append(("log", dict(values)))

    def finish(self) -> None:
        print("* Run finished.")
        self.calls.append(("finish", None))


class Flow(Tracker):
    """What mlflow looks like."""

    def set_experiment(self, name: str) -> None:
        self.calls.append(("experiment", name))

    def start_run(self) -> None:
        self.calls.append(("start", None))

    def log_metrics(self, values: Mapping[str, float], step: int) -> None:
        self.calls.append(("log", (values, step)))

    def end_run(self) -> None:
        self.calls.append(("end", None))


def test_json_lines_of_a_run(shell: Shell, tmp_path: Path) -> None:
    sets = (*SMALL, f"{MODIFIER}.targets=[re:.*layers.0.*proj]", f"{MODIFIER}.iterations=3")
    words = [part for word in sets for part in ("--set", word)]
    done = shell("armor-apply", "quickstart", *words, "--json", "--metrics", "logs/m.jsonl")
    assert done.code == 0, done.err
    result = json.loads(done.out)
    lines = [json.loads(line) for line in (tmp_path / "logs" / "m.jsonl").read_text().splitlines()]
    times = [line.pop("time") for line in lines]
    assert times == sorted(times)
    found = {name: value for line in lines for name, value in line.items()}
    for name, module in result["modules"].items():
        assert found[f"first_loss/{name}"] == module["first_loss"]
        steps = [line["step"] for line in lines if f"loss/{name}" in line]
        assert steps == sorted(set(steps))
        assert steps[-1] <= 3
    assert found["evaluation/perplexity/perplexity/before"] == result["perplexity_before"]
    assert found["evaluation/perplexity/perplexity/after"] == result["perplexity_after"]
    phases = {name.partition("/")[2] for name in found if name.startswith("phase_seconds/")}
    folders = {name.rpartition("/")[0] for name in found} - {""}
    assert not folders & found.keys()  # a tracker's files and folders have these names
    assert {"load weights", "evaluate before", "compress", "evaluate after", "save", "verify"} <= phases
    assert found["share"] == pytest.approx(1.0)
    assert found["peak_memory_bytes"] > 1e7
    assert lines[-1]["run_seconds"] >= sum(found[f"phase_seconds/{phase}"] for phase in phases) - 1e-6
    manifest = (tmp_path / "out" / "quickstart" / "armor_manifest.json").read_text()
    assert shell("armor-apply", "quickstart", *words, "--overwrite", "--quiet").code == 0
    assert (tmp_path / "out" / "quickstart" / "armor_manifest.json").read_text() == manifest


def test_lines_are_added_and_not_finite_numbers_are_null(tmp_path: Path) -> None:
    for loss in (0.5, math.nan):
        with metrics_to([str(tmp_path / "m.jsonl")]) as observer:
            observer(SolveProgressed("q", 7, 9, loss))
        assert not observer.failed
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_text().splitlines()]
    assert [(line["step"], line["loss/q"]) for line in lines if "loss/q" in line] == [(7, 0.5), (7, None)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_trackers_that_count_steps_for_themselves(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tracker = Tracker()
    monkeypatch.setitem(sys.modules, name, tracker)
    with metrics_to([f"{name}:mine"]) as observer:
        observer(SolveProgressed("q", 2, 9, 0.25))
        observer(UnitRefined("layer 0", 0.5, 0.25, 4, 1.5, 0.75))
    assert tracker.calls[:2] == [("init", "mine"), ("log", {"loss/q": 0.25, "module_step": 2})]
    assert tracker.calls[2][1]["last_loss/layer 0"] == 0.25
    assert [call for call, _ in tracker.calls].count("finish") == 1
    assert capsys.readouterr() == ("", "* Run finished.\n")  # standard output is for results


def test_mlflow_and_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, board = Flow(), []
    writer = SimpleNamespace(add_scalar=lambda *words: board.append(words), close=lambda: board.append(()))
    monkeypatch.setitem(sys.modules, "mlflow", flow)
    monkeypatch.setitem(sys.modules, "tensorboard", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda folder: writer))
    with metrics_to(["mlflow", "tensorboard:logs", "mlflow"]) as observer:
        observer(SolveProgressed("q", 2, 9, 0.25))
        observer(ModuleFinished("q", 0.5, 0.25, 0.1, 1.0))
    assert flow.calls[:3] == [("experiment", "armor-recipes"), ("start", None), ("log", ({"loss/q": 0.25}, 2))]
    assert flow.calls[-1] == ("end", None)
    assert board[0] == ("loss/q", 0.25, 2)
    assert ("share", 1.0, 1) in board
    assert board[-1] == ()


def test_a_package_that_is_missing_names_its_extra(shell: Shell, llama: Path, tmp_path: Path) -> None:
    file = write_recipe(tmp_path, llama)
    for name in ("tensorboard", "trackio", "wandb", "mlflow"):
        shell.monkeypatch.setitem(sys.modules, name, None)
        done = shell("armor-apply", file, "--metrics", name)
        assert (done.code, f"pip install 'armor-recipes[{name}]'" in done.err) == (2, True), done.err
    for words in (
        ("--metrics", "m.txt"),
        ("--metrics", "m.jsonl", "--plan"),
        ("--metrics", "d.jsonl"),
        ("--metrics", "out/m.jsonl"),
        ("--metrics", "e.jsonl", "--metrics", "./e.jsonl"),
        ("--metrics", "e.jsonl", "--metrics", "wandb"),
    ):
        (tmp_path / "d.jsonl").mkdir(exist_ok=True)
        done = shell("armor-apply", file, *words)
        assert (done.code, "--metrics" in done.err) == (2, True), done.err
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "e.jsonl").exists()


@pytest.mark.parametrize("before", [None, '{"step": 0}\n'])
def test_a_run_that_is_refused_leaves_no_file_and_no_line(
    before: str | None, shell: Shell, llama: Path, tmp_path: Path
) -> None:
    file, log = write_recipe(tmp_path, llama), tmp_path / "m.jsonl"
    if before is not None:
        log.write_text(before)
    done = shell("armor-apply", file, "--metrics", log, "--set", "calibration.dataset=missing.txt")
    assert done.code == 5, done.err
    assert (log.read_text() if log.exists() else None) == before


def test_a_sink_that_fails_is_left_out_and_told(tmp_path: Path) -> None:
    class Full:
        def log(self, values: Mapping[str, float], step: int) -> None:
            raise OSError(28, "No space left on device")

        def close(self) -> None:
            raise AssertionError("it was left out")

    kept = open_sink(str(tmp_path / "m.jsonl"))
    observer = Metrics({"full": Full(), "kept": kept})
    observer(SolveProgressed("q", 1, 9, 0.5))
    observer(SolveProgressed("q", 2, 9, 0.25))
    observer.close()
    (said,) = observer.failed
    assert said.startswith("--metrics full failed and was left out from there on (OSError: ")
    assert len((tmp_path / "m.jsonl").read_text().splitlines()) == 3


def test_nothing_is_imported_unless_it_is_asked_for() -> None:
    code = (
        "import sys; from armor_recipes.report.metrics import metrics_to\n"
        "with metrics_to([]): pass\n"
        "print({'tensorboard', 'trackio', 'wandb', 'mlflow', 'torch.utils.tensorboard'} & sys.modules.keys())"
    )
    command = [sys.executable, "-c", code]
    assert subprocess.run(command, env=surroundings(), capture_output=True, text=True, check=True).stdout == "set()\n"
