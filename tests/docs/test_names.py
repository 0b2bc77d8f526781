"""Names of the code that the docs mention exist."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

from tests.support.pages import PAGES, ROOT

PACKAGE = ROOT / "armor_recipes"


def test_solver_functions_are_where_the_page_says() -> None:
    rows = re.findall(
        r"^\| (.*) \| `(armor_recipes/.*)\.py` \|$", (ROOT / "docs/solver.md").read_text("utf-8"), re.MULTILINE
    )
    assert len(rows) >= 6
    for names, path in rows:
        module = import_module(path.replace("/", "."))
        assert not [name for name in re.findall(r"`(\w+)`", names) if not hasattr(module, name)], path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_of_the_code_exist(page: Path) -> None:
    paths = re.findall(r"`((?:armor_recipes|tests|benchmarks|tools)/[\w/.-]*)`", page.read_text("utf-8"))
    assert not [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]


def test_every_room_is_in_the_table_and_no_other() -> None:
    page = (ROOT / "docs/architecture.md").read_text("utf-8").split("## Rooms")[1].split("\n## ")[0]
    rooms = {name for row in re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms == folders | {"errors", "events", "exhaustion", "paths", "version"}


def test_rooms_are_in_the_order_of_the_import_contract() -> None:
    page = (ROOT / "docs/architecture.md").read_text("utf-8").split("## Rooms")[1].split("\n## ")[0]
    rows = [re.findall(r"`(\w+)`", row) for row in re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)]
    contract = (ROOT / "pyproject.toml").read_text("utf-8").split("\nlayers = [")[1].split("]")[0]
    layers = [line.split(" | ") for line in re.findall(r'"(.+)"', contract)]
    assert [sorted(row) for row in rows] == [sorted(layer) for layer in layers]
