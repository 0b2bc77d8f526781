"""docs/cli.md against the command line, and every command of the docs against its parser."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from armor_recipes import errors
from armor_recipes.cli import apply, guard, main
from armor_recipes.run import prepare
from armor_recipes.run.job import read_recipe
from tests.support.pages import (
    FROM_LLM_COMPRESSOR,
    PAGES,
    ROOT,
    commands,
    first_recipe,
    inline_commands,
    named_recipes,
    planned_model,
    section,
)

PAGE = ROOT / "docs" / "cli.md"
SHELL = inline_commands() + commands()
ARMOR = [(place, shlex.split(line)) for place, line in SHELL if line.startswith("armor")]
ARMOR_IDS = [f"{place} {' '.join(words[:2])}" for place, words in ARMOR]


def parsers() -> dict[str, Any]:
    """The parser of `armor-apply` and of each verb, by the words that call it."""
    verbs: Any = typer.main.get_command(main.app)
    named = {f"armor {verb}": command for verb, command in verbs.commands.items()}
    return {"armor-apply": typer.main.get_command(apply.app), **named}


def options(command: Any) -> set[str]:
    """Every spelling of every flag, those of the help included."""
    group: Any = typer.main.get_command(main.app)
    parent = None if command.name == "apply-command" else group.make_context("armor", ["schema"])
    params = command.get_params(command.make_context("x", [], parent=parent, resilient_parsing=True))
    return {name for param in params if param.param_type_name == "option" for name in param.opts}


def test_every_command_has_a_section_and_no_other() -> None:
    headings = re.findall(r"^## (armor.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(parsers())


@pytest.mark.parametrize("name", sorted(parsers()))
def test_every_flag_is_documented_and_no_other(name: str) -> None:
    rows = re.findall(r"^\| (`-.*?) \|", section(PAGE, name), re.MULTILINE)
    documented = {flag for row in rows for flag in re.findall(r"`(--?[a-z-]+)", row)}
    assert documented == options(parsers()[name])


def test_exit_codes_are_those_of_the_errors() -> None:
    classes = [
        value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, errors.ArmorError)
    ]
    rows = re.findall(r"^\| (\d+) \| .* \| (.*?) ?\|$", section(PAGE, "Exit codes"), re.MULTILINE)
    documented = {name: int(code) for code, names in rows for name in re.findall(r"`(\w+)`", names)}
    assert documented == {cls.__name__: cls.exit_code for cls in classes}
    codes = {int(code) for code, _ in rows}
    assert codes == {
        0,
        guard.BUG,
        guard.USAGE,
        guard.HUNG_UP,
        guard.INTERRUPTED,
        guard.TERMINATED,
        *documented.values(),
    }


def arguments(words: list[str]) -> tuple[Any, list[str]]:
    """The parser that a command line is for, and what it is given (a redirection is the shell's)."""
    words = words[: words.index(">")] if ">" in words else words
    return (
        (parsers()["armor-apply"], words[1:])
        if words[0] == "armor-apply"
        else (parsers()[" ".join(words[:2])], words[2:])
    )


@pytest.mark.parametrize("words", [words for _, words in ARMOR], ids=ARMOR_IDS)
def test_commands_of_the_docs_parse(words: list[str]) -> None:
    command, given = arguments(words)
    assert command.make_context(words[0], given).params is not None


@pytest.fixture
def working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the recipes in it, those that pages give a name, and one as llm-compressor writes it beside a checkpoint."""
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    recipes = [named_recipes(page) for page in PAGES if page.name != "README.md"]
    assert len({name for named in recipes for name in named}) == sum(map(len, recipes))
    for name, text in [*(each for named in recipes for each in named.items()), ("mine.yaml", first_recipe())]:
        (tmp_path / name).write_text(text, encoding="utf-8")  # `armor init` writes mine.yaml
    (tmp_path / "recipe.yaml").write_text(FROM_LLM_COMPRESSOR, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


APPLY = [(place, words) for place, words in ARMOR if words[0] == "armor-apply"]


@pytest.mark.parametrize(
    "words", [words for _, words in APPLY], ids=[f"{place} {' '.join(w[1:3])}" for place, w in APPLY]
)
@pytest.mark.usefixtures("working_directory")
def test_recipes_of_commands_plan(words: list[str], tmp_path: Path, packed: Path) -> None:
    command, given = arguments(words)
    params = command.make_context(words[0], given).params
    recipe = read_recipe(params["recipes"], overrides=params["overrides"] or (), output=params["output"])
    model = planned_model(recipe.model.id, tmp_path / "model", packed)
    recipe = read_recipe(params["recipes"], overrides=params["overrides"] or (), output=params["output"], model=model)
    assert prepare(recipe).plan.modules


def test_other_commands_of_the_docs_exist() -> None:
    targets = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    missing = []
    for place, line in SHELL:
        words = shlex.split(line)
        name = Path(words[0]).name
        known = name in ("armor", "armor-apply", "torchrun") or (name == "make" and words[1] in targets)
        known = known or (name == "python" and (words[1] in ("-c", "-m") or (ROOT / words[1]).is_file()))
        if not known:
            missing.append(f"{place}: {line}")
    assert not missing
