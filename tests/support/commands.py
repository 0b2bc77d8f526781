"""Runs the commands as a shell would, in this process or in one of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
import yaml

from armor_recipes.cli import apply, main
from tests.support.engine import recipe
from tests.support.forks import Fork, Forks

MAINS: dict[str, Callable[[], object]] = {"armor-apply": apply.main, "armor": main.main}
#: A job in a background shell inherits an ignored SIGINT, one under `nohup` an ignored SIGHUP, and so would what it starts: these
#: listen all the same.
LISTEN = (
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    "signal.signal(signal.SIGHUP, signal.SIG_DFL); "
)
START = {
    "armor-apply": LISTEN + "from armor_recipes.cli.apply import main; main()",
    "armor": LISTEN + "from armor_recipes.cli.main import main; main()",
}


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str


class Shell:
    """Runs a command in this process; what it prints is captured."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch = monkeypatch
        self.capsys = capsys

    def __call__(self, *command: object) -> Done:
        name, *words = map(str, command)
        self.monkeypatch.setattr(sys, "argv", [name, *words])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            MAINS[name]()
        captured = self.capsys.readouterr()
        done = Done(int(ended.value.code or 0), captured.out, captured.err)
        assert done.code == 1 or "Traceback" not in done.err
        return done


def process(*command: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    name, *words = map(str, command)
    return subprocess.Popen(
        [sys.executable, "-c", START[name], *words],
        cwd=cwd,
        env={**surroundings(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def surroundings() -> dict[str, str]:
    """The environment of commands in a process of their own: this package is found."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(apply.__file__).parents[2])}


def forked(
    forks: Forks, *command: object, cwd: Path, streams: Mapping[int, int] = MappingProxyType({}), **environment: str
) -> Fork:
    """Start it in a fork of a process that has imported torch and transformers, which takes a third of the time."""
    name, *words = command
    found = {**surroundings(), **environment}
    return forks.start(START[str(name)], *words, folder=cwd, environment=found, streams=streams)


def finished(running: subprocess.Popen[str] | Fork) -> Done:
    """Wait for it."""
    out, err = running.communicate(timeout=60)
    assert running.returncode is not None
    return Done(running.returncode, out, err)


def write_recipe(folder: Path, model: Path | str, **modifiers: dict[str, object]) -> Path:
    """A recipe file with the output `out` beside it."""
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe(model, folder / "out", **modifiers), sort_keys=False))
    return file
