"""The constraints files against pyproject.toml: what the Makefile's environments install is what is allowed, down to the lowest."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[2]
FILES = (ROOT / "constraints.txt", *sorted((ROOT / "constraints").glob("*.txt")))


#: Their pins are of sets of their own; of trackers there are none, since no target of the Makefile installs them.
BY_THEMSELVES = ("llmcompressor", "eval", "docs", "tensorboard", "trackio", "wandb", "mlflow")
#: Sets without the package, and so without what it asks for.
WITHOUT_PACKAGE = ("docs",)


def allowed(*, beside: str = "") -> dict[str, Requirement]:
    """What pyproject.toml asks for, extras too but for those that are in no set but their own, by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    if beside in WITHOUT_PACKAGE:
        sets = [extras[beside]]
    else:
        sets = [project["dependencies"]]
        sets += [lines for name, lines in extras.items() if name not in BY_THEMSELVES or name == beside]
    asked = [Requirement(line) for lines in sets for line in lines]
    return {canonicalize_name(wanted.name): wanted for wanted in asked if wanted.name != project["name"]}


def pinned(file: Path) -> dict[str, Version]:
    """Every line of a constraints file but for comments; a line that pins no release fails."""
    lines = [line for line in file.read_text("utf-8").splitlines() if line and not line.startswith("#")]
    found = dict(re.fullmatch(r"([\w.-]+)==([\w.]+)", line).groups() for line in lines)  # type: ignore[union-attr]
    assert len(found) == len(lines)
    return {canonicalize_name(name): Version(version) for name, version in found.items()}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_everything_is_pinned_within_its_bounds(file: Path) -> None:
    asked, pins = allowed(beside=file.stem), pinned(file)
    assert asked.keys() - pins.keys() <= {"setuptools"}  # pip freeze leaves it out
    assert not [name for name, wanted in asked.items() if name in pins and pins[name] not in wanted.specifier]


def test_the_lowest_are_the_lowest() -> None:
    pins = pinned(ROOT / "constraints/lowest.txt")
    bounds = {name: [s.version for s in wanted.specifier if s.operator == ">="] for name, wanted in allowed().items()}
    assert all(len(lower) == 1 for lower in bounds.values())
    higher = {name for name, (lower,) in bounds.items() if pins[name] != Version(lower)}
    assert higher == {"torch"}


def test_every_set_has_its_target() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    clean = makefile.split("\nclean:")[1]
    for name in ("dev", *(file.stem for file in FILES if file.parent != ROOT)):
        assert f".venv-{name}/.ready" in makefile
        assert f" .venv-{name} " in clean
