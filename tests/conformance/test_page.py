"""docs/modifiers.md against the code and the records, and what the records say of orders against the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from armor_recipes.modifiers import modifiers
from armor_recipes.run import prepare
from armor_recipes.run.job import read_recipe
from tests.conformance.cases import EXPECTED, expected
from tests.conformance.orders import orders
from tests.conformance.page import PAGE, page, records
from tests.support.pages import Block, blocks

RECIPES = blocks("yaml", page=PAGE)


def test_the_page_is_what_code_and_records_give() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(expected()), "run make modifiers"


def test_the_records_are_written_in_one_way() -> None:
    assert EXPECTED.read_text(encoding="utf-8") == records(expected())


def test_the_plan_answers_for_each_two_modifiers_as_recorded() -> None:
    assert orders() == expected()["orders"], "if that is right, run make modifiers"


def test_every_modifier_has_a_recipe() -> None:
    last = [list(yaml.safe_load(block.text)["example_stage"]["example_modifiers"]) for block in RECIPES]
    assert len(last) == len(modifiers())
    assert all(name in names for name, names in zip(modifiers(), last, strict=True))


@pytest.mark.parametrize("block", RECIPES, ids=str)
def test_its_recipes_plan(block: Block, tmp_path: Path) -> None:
    (tmp_path / "page.yaml").write_text(block.text, encoding="utf-8")
    assert prepare(read_recipe(tmp_path / "page.yaml")).plan.rows
