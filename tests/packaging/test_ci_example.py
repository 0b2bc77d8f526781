"""`examples/ci`: the steps of its workflow and action, run in bash as a runner would, but for what needs GitHub or an index."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.commands import START, Shell, surroundings
from tests.support.pages import ROOT

EXAMPLE = ROOT / "examples" / "ci"
ACTION = EXAMPLE / ".github" / "actions" / "armor"
TEXT = "It was a bright cold day in April, and the clocks were striking.\n"
RECIPE = r"""
model: builtin:stdlib-llama
calibration: {dataset: notes.txt, samples: 4, sequence_length: 32}
prune_stage:
  armor_modifiers:
    ARMORModifier: {targets: ['re:.*layers\.0.*up_proj$'], block_size: 32, iterations: 2}
output: {path: armor-out/model}
evaluation:
  perplexity: {dataset: builtin:pydoc-heldout, sequence_length: 64, windows: 2}
"""


def read(file: Path) -> Any:
    return yaml.load(file.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # `on` stays a word


@dataclass
class Runner:
    """A workspace, and the steps of jobs in it; what a step says is kept."""

    workspace: Path
    bin: Path
    outputs: dict[str, dict[str, str]] = field(default_factory=dict)
    said: str = ""

    def run(self, steps: list[dict[str, Any]], *, path: Path, inputs: dict[str, str]) -> list[tuple[str, int]]:
        """Run steps until one fails, and then those that always run; (id, exit code) of each that ran."""
        ended: list[tuple[str, int]] = []
        for step in steps:
            if "uses" in step or step["id"] == "install":
                continue
            if all(code == 0 for _, code in ended) or "always()" in step.get("if", ""):
                ended.append((step["id"], self.step(step, path, inputs)))
        return ended

    def step(self, step: dict[str, Any], path: Path, inputs: dict[str, str]) -> int:
        output, script = self.bin / "output", self.bin / "step.sh"
        output.write_text("")
        script.write_text(step["run"])
        environment = {
            **surroundings(),
            **{name: self.value(value, inputs) for name, value in step.get("env", {}).items()},
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "GITHUB_OUTPUT": str(output),
            "GITHUB_STEP_SUMMARY": str(self.bin / "summary.md"),
            "GITHUB_ACTION_PATH": str(path),
        }
        assert step["shell"] == "bash"
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", str(script)]
        done = subprocess.run(command, cwd=self.workspace, env=environment, capture_output=True, text=True, check=False)
        self.said = done.stdout + done.stderr
        assert "Traceback" not in self.said
        self.outputs[step["id"]] = dict(line.split("=", 1) for line in output.read_text().splitlines())
        return done.returncode

    def value(self, text: str, inputs: dict[str, str]) -> str:
        return re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: inputs[found[1]], text)

    @property
    def summary(self) -> str:
        return (self.bin / "summary.md").read_text()


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    """The example as a repository of its own, with a recipe that takes no time, and our commands on the path."""
    workspace, programs = tmp_path / "work", tmp_path / "bin"
    shutil.copytree(EXAMPLE, workspace)
    (workspace / "recipe.yaml").write_text(RECIPE)
    (workspace / "notes.txt").write_text(TEXT * 60)
    programs.mkdir()
    for name, start in START.items():
        (programs / name).write_text(f"#!{sys.executable}\n{start}\n")
        (programs / name).chmod(0o755)
    (programs / "python").symlink_to(sys.executable)
    return Runner(workspace, programs)


@pytest.mark.slow  # eleven processes that import torch
def test_a_lock_that_holds_and_one_that_a_token_breaks(runner: Runner) -> None:
    workflow, action = read(runner.workspace / ".github" / "workflows" / "armor.yml"), read(ACTION / "action.yml")
    here = runner.workspace / ".github" / "actions" / "armor"
    assert runner.run(workflow["jobs"]["lock"]["steps"], path=here, inputs={}) == [("lock", 0)]
    assert "tensors: |" in (runner.workspace / "recipe.lock.yaml").read_text()
    shutil.rmtree(runner.workspace / "armor-out")  # another machine of that class

    (given,) = [step["with"] for step in workflow["jobs"]["compress"]["steps"] if "armor" in step["uses"]]
    inputs = {name: each["default"] for name, each in action["inputs"].items()} | given
    steps = action["runs"]["steps"]
    whole = [("names", 0), ("apply", 0), ("verify", 0), ("summary", 0)]
    assert runner.run(steps, path=here, inputs=inputs) == whole
    assert runner.outputs["names"] == {"lock": "recipe.lock.yaml", "folder": "armor-out"}
    manifest = json.loads((runner.workspace / "armor-out" / "model" / "armor_manifest.json").read_text())
    assert f"| perplexity | {manifest['evaluation']['before']['perplexity']:.3f} | " in runner.summary
    assert "| weights of the modules | " in runner.summary
    assert "\n1 modules; time " in runner.summary

    first = (runner.workspace / "armor-out" / "model" / "report.json").read_bytes()
    assert runner.run(steps, path=here, inputs=inputs) == whole  # from the cache
    assert (runner.workspace / "armor-out" / "model" / "report.json").read_bytes() == first

    (runner.workspace / "notes.txt").write_text(TEXT.replace("cold", "warm") + TEXT * 59)
    shutil.rmtree(runner.workspace / "armor-out")  # the cache of another lock
    assert runner.run(steps[:-2], path=here, inputs=inputs) == [("names", 0), ("apply", 6)]
    assert "datasets.1.sha256: locked" in runner.said
    assert runner.run(steps, path=here, inputs=inputs)[-1] == ("summary", 0)
    assert "No output in `model`" in runner.summary
    assert not (runner.workspace / "armor-out").exists()


def test_workflow_and_action_are_what_github_reads() -> None:
    workflow, action = read(EXAMPLE / ".github" / "workflows" / "armor.yml"), read(ACTION / "action.yml")
    assert action["runs"]["using"] == "composite"
    steps = [*action["runs"]["steps"], *(step for job in workflow["jobs"].values() for step in job["steps"])]
    for step in steps:
        assert ("uses" in step) != ("run" in step)
        if "run" in step:  # what comes from outside goes through the environment, and is never a part of a script
            assert "${{" not in step["run"]
        elif not step["uses"].startswith("./"):
            assert re.fullmatch(r"actions/[\w/-]+@v\d+", step["uses"])
    for job in workflow["jobs"].values():
        assert job["runs-on"] == "ubuntu-24.04"
        for step in job["steps"]:
            if step.get("uses", "").startswith("./"):
                assert step["with"].keys() <= action["inputs"].keys()
                assert (EXAMPLE / step["uses"] / "action.yml").is_file()
    used = set(re.findall(r"\$\{\{ inputs\.([\w-]+) \}\}", (ACTION / "action.yml").read_text()))
    assert used == set(action["inputs"])
    asked = [
        re.search(r"pip install --requirement (\S+)$", step["run"]) for step in steps if step.get("id") == "install"
    ]
    assert [found and found[1] for found in asked] == ['"$REQUIREMENTS"', "requirements.txt"]


def test_requirements_are_the_releases_that_are_tested() -> None:
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    asked = dict(re.findall(r"^([\w-]+)==(\S+)$", (EXAMPLE / "requirements.txt").read_text(), re.MULTILINE))
    assert (
        asked.pop("armor-recipes") == re.search(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
    )  # type: ignore[index]
    assert {name: pins[name].split("+")[0] for name in asked} == asked


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Shell:
    monkeypatch.chdir(tmp_path)
    return Shell(monkeypatch, capsys)


def test_the_hook_checks_recipes_and_their_locks(shell: Shell, tmp_path: Path) -> None:
    (hook,) = read(ROOT / ".pre-commit-hooks.yaml")
    own = read(EXAMPLE / ".pre-commit-config.yaml")["repos"][0]["hooks"][0]
    assert {key: own[key] for key in ("id", "entry", "files", "exclude")} == {
        key: hook[key] for key in ("id", "entry", "files", "exclude")
    }
    names = ["recipe.yaml", "a/recipes/b.yml", "recipe.lock.yaml", "recipes/b.lock.yaml", "config.yaml", "recipes/b.md"]
    taken = [name for name in names if re.search(hook["files"], name) and not re.search(hook["exclude"], name)]
    assert taken == ["recipe.yaml", "a/recipes/b.yml"]

    entry = hook["entry"].split()
    shutil.copy(EXAMPLE / "recipe.yaml", "recipe.yaml")
    Path("bad.yaml").write_text(RECIPE.replace("block_size", "block_sise"))
    done = shell(*entry, "recipe.yaml", *sorted((ROOT / "recipes").glob("*.yaml")))
    assert (done.code, done.out.count("well formed")) == (0, 1 + len(list((ROOT / "recipes").glob("*.yaml"))))
    done = shell(*entry, "recipe.yaml", "bad.yaml", "nowhere.yaml")
    assert (done.code, "recipe.yaml: well formed" in done.out) == (2, True)
    assert "block_size" in done.err
    assert "nowhere.yaml" in done.err

    Path("notes.txt").write_text(TEXT * 60)
    Path("recipe.yaml").write_text(RECIPE)
    assert shell("armor", "lock", "recipe.yaml").code == 0
    assert "and what recipe.lock.yaml locks" in shell(*entry, "recipe.yaml").out
    Path("recipe.yaml").write_text(RECIPE.replace("iterations: 2", "iterations: 3"))
    done = shell(*entry, "recipe.yaml")
    assert (done.code, "iterations: locked 2, now 3" in done.err) == (6, True)
