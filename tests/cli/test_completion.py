"""Completion in a shell: verbs, flags, names of recipes, and nothing slow behind a key."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from armor_recipes.cli.completion import complete_names, complete_recipes
from tests.support.commands import MAINS, surroundings

ROOT = Path(__file__).parents[2]
CODE = "import sys\nfrom armor_recipes.cli.{0} import main\ntry:\n    main()\nfinally:\n    assert 'torch' not in sys.modules\n"


def ask(name: str, *words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    module = MAINS[name].__module__.rpartition(".")[2]
    command = [sys.executable, "-c", CODE.format(module), *words]
    return subprocess.run(
        command, cwd=cwd, env={**surroundings(), **environment}, capture_output=True, text=True, check=False
    )


def completed(name: str, line: str, cwd: Path) -> list[str]:
    variable = f"_{name.upper().replace('-', '_')}_COMPLETE"
    count = str(len(line.split(" ")) - 1)
    done = ask(name, cwd=cwd, COMP_WORDS=line, COMP_CWORD=count, **{variable: "complete_bash"})
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.split()


def test_recipes_files_and_folders(tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").touch()
    (tmp_path / "quiet").mkdir()
    (tmp_path / "quiet" / "x.yaml").touch()
    (tmp_path / "quit.txt").touch()
    assert completed("armor-apply", "armor-apply qui", tmp_path) == ["quickstart", "quick.yaml", "quiet/"]
    assert completed("armor-apply", "armor-apply quiet/", tmp_path) == ["quiet/x.yaml"]
    assert completed("armor-apply", "armor-apply --ov", tmp_path) == ["--overwrite"]
    assert complete_recipes("no/such/folder") == []


def test_verbs_and_names(tmp_path: Path) -> None:
    assert completed("armor", "armor ins", tmp_path) == ["inspect"]
    assert completed("armor", "armor recipes smollm2-135m-b", tmp_path) == ["smollm2-135m-block32"]
    assert complete_names("") == sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", ["armor", "armor-apply"])
def test_the_script_is_shown_and_installed(name: str, tmp_path: Path) -> None:
    where = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1", "HOME": str(tmp_path)}
    shown = ask(name, "--show-completion", "bash", cwd=tmp_path, **where)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert f"_{name.upper().replace('-', '_')}_COMPLETE=complete_bash" in shown.stdout
    done = ask(name, "--install-completion", "bash", cwd=tmp_path, **where)
    assert (done.returncode, done.stderr) == (0, "")
    assert os.listdir(tmp_path / ".bash_completions") == [f"{name}.sh"]  # noqa: PTH208


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    done = ask(
        "armor",
        "--install-completion",
        "bash",
        cwd=tmp_path,
        HOME="/proc",
        _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1",
    )
    assert done.returncode == 2, done.stderr
    assert "/proc/" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "variables", [{}, {"COMP_WORDS": "armor ins"}, {"COMP_WORDS": "armor ins", "COMP_CWORD": "one"}]
)
def test_a_shell_that_does_not_say_what_to_complete_is_told(variables: dict[str, str], tmp_path: Path) -> None:
    done = ask("armor", cwd=tmp_path, _ARMOR_COMPLETE="complete_bash", **variables)
    assert done.returncode == 2, done.stderr
    assert "COMP_CWORD" in done.stderr
    assert "Traceback" not in done.stderr
