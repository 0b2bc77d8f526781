"""Paths as people write them, and files that a command must not write over."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from tests.support.commands import Shell
from tests.support.engine import recipe, save_model


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder with a model in it, and a working directory elsewhere."""
    folder = tmp_path / "home"
    save_model(folder / "model")
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(folder))
    return folder


def test_a_tilde_is_the_home_folder_wherever_a_path_is_taken(shell: Shell, home: Path) -> None:
    (home / "base.yaml").write_text(yaml.safe_dump(recipe("~/model", "~/out/first")))
    Path("r.yaml").write_text("extends: ~/base.yaml\n")
    assert shell("armor-apply", "r.yaml", "--quiet", "--report", "~/reports/r.json").code == 0
    assert shell("armor-apply", "~/base.yaml", "--quiet", "--output", "~/out/second").code == 0
    assert (home / "reports" / "r.json").is_file()
    for words in (
        ("inspect", "~/out/first"),
        ("verify", "~/out/first"),
        ("export", "~/out/first", "~/out/dense", "--to", "dense"),
        ("verify", "~/out/dense"),
    ):
        assert shell("armor", *words).code == 0, words
    assert sorted(path.name for path in (home / "out").iterdir()) == ["dense", "first", "second"]
    assert [path.name for path in Path.cwd().iterdir()] == ["r.yaml"]
    failed = shell("armor-apply", "r.yaml", "--output", "~nobody-of-this-name/out")
    assert failed.code in (2, 5)
    assert "~nobody-of-this-name" in failed.err


def test_what_the_system_takes_for_no_path_is_told(shell: Shell, home: Path) -> None:
    Path("loop").symlink_to("loop")
    long = "x" * 300
    for words in (
        ("verify", long),
        ("inspect", long),
        ("eval", long),
        ("status", "loop"),
        ("init", f"{long}.yaml", "--model", "~/model", "--calibration", "mix", "--block-size", "8"),
        ("init", "loop", "--model", "~/model", "--calibration", "mix", "--block-size", "8"),
    ):
        done = shell("armor", *words)
        assert done.code in (2, 5), (words, done.err)
        assert "Traceback" not in done.err, words
        assert "loop" in done.err or "x" * 70 in done.err


def test_a_project_folder_is_never_replaced(shell: Shell, home: Path) -> None:
    project = Path.cwd()
    shutil.copytree(home / "model", project, dirs_exist_ok=True)  # a model, and the recipe beside it
    Path("r.yaml").write_text(yaml.safe_dump(recipe("~/model", ".")))
    before = sorted(project.iterdir())
    failed = shell("armor-apply", "r.yaml", "--overwrite")
    assert failed.code == 2
    assert "is or holds" in failed.err
    assert sorted(project.iterdir()) == before


@pytest.mark.parametrize("what", ["recipe", "dataset", "model"])
def test_what_a_run_reads_is_never_replaced(shell: Shell, home: Path, what: str) -> None:
    out = save_model(Path.cwd() / "out")
    mapping = recipe("~/model", out)
    if what == "dataset":
        (out / "README.md").write_text("text " * 900)
        mapping["calibration"]["dataset"] = "out/README.md"
    if what == "model":
        save_model(out / "inner")
        mapping["model"] = "out/inner"
    file = (out if what == "recipe" else Path.cwd()) / "recipe.yaml"
    file.write_text(yaml.safe_dump(mapping))
    failed = shell("armor-apply", file, "--overwrite")
    assert failed.code == 2
    assert f"is or holds the {what}" in failed.err
    assert (out / "model.safetensors").exists()


def test_a_report_replaces_nothing_but_a_report(shell: Shell, home: Path) -> None:
    Path("r.yaml").write_text(yaml.safe_dump(recipe("~/model", "out")))
    text = Path("r.yaml").read_text()
    failed = shell("armor-apply", "r.yaml", "--report", "r.yaml")
    assert failed.code == 2
    assert "is no report of this tool" in failed.err
    assert Path("r.yaml").read_text() == text
    assert not Path("out").exists()
    assert shell("armor-apply", "r.yaml", "--quiet", "--report", "report.json").code == 0
    assert shell("armor-apply", "r.yaml", "--quiet", "--report", "report.json", "--overwrite").code == 0
    assert json.loads(Path("report.json").read_text())["seconds"] > 0
    assert sorted(path.name for path in Path.cwd().iterdir()) == ["out", "r.yaml", "report.json"]
