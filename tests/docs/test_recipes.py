"""Recipes in the docs load, and the docs know every recipe."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from armor_recipes.modifiers import config_types
from armor_recipes.recipe import load_recipe
from armor_recipes.run import prepare
from armor_recipes.run.job import read_recipe
from tests.support.pages import PAGES, RECIPES, ROOT, Block, blocks, planned_model, without_blocks

README = ROOT / "README.md"
#: Recipes for the modifier that CONTRIBUTING.md makes are tested with it (test_add_a_modifier.py).
YAML = [block for block in blocks("yaml") if block.page.name != "CONTRIBUTING.md"]


def _keys(block: Block) -> dict[str, Any]:
    data = yaml.safe_load(block.text)
    assert isinstance(data, dict)
    return data


def _is_whole(block: Block) -> bool:
    return "extends" in _keys(block) or any(key.endswith("_stage") for key in _keys(block))


def test_there_are_whole_recipes_in_the_docs() -> None:
    assert sum(_is_whole(block) for block in YAML) >= 3


@pytest.mark.parametrize("block", YAML, ids=str)
def test_recipes_of_the_docs_load(block: Block, tmp_path: Path) -> None:
    for recipe in RECIPES:
        shutil.copy(recipe, tmp_path)
    text = block.text
    if not _is_whole(block):  # a section: laid over a recipe that has the rest
        text = f"extends: quickstart.yaml\n{text}"
    (tmp_path / "page.yaml").write_text(text, encoding="utf-8")
    assert load_recipe([tmp_path / "page.yaml"], registry=config_types()).modifiers


def test_the_first_recipe_has_a_remark_for_each_number() -> None:
    first = blocks("yaml", page=README)[0].text
    numbers = re.findall(r"# (\d+)$", first, re.MULTILINE)
    text = README.read_text(encoding="utf-8").split("## A first recipe")[1].split("\n## ")[0]
    assert numbers == re.findall(r"^(\d+)\. ", text, re.MULTILINE) == [str(n + 1) for n in range(len(numbers))]


def test_readme_names_every_recipe_and_no_other() -> None:
    text = README.read_text(encoding="utf-8")
    assert all(f"[`recipes/{recipe.name}`]" in text for recipe in RECIPES)
    named = {name for page in PAGES for name in re.findall(r"recipes/([\w.-]+\.yaml)", without_blocks(page))}
    assert named == {recipe.name for recipe in RECIPES}


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_plans(recipe: Path, tmp_path: Path) -> None:
    model = planned_model(read_recipe(recipe).model.id, tmp_path)
    plan = prepare(read_recipe(recipe, model=model)).plan
    assert plan.modules
    assert plan.totals.bytes_after <= plan.totals.bytes_before


@pytest.mark.parametrize(("name", "block"), [("smollm2-135m", 64), ("smollm2-135m-block32", 32)])
def test_the_factors_of_the_smollm2_recipes_are_no_more_than_those_of_equal_blocks(
    name: str, block: int, tmp_path: Path
) -> None:
    plan = prepare(read_recipe(name, model=planned_model("fetched", tmp_path))).plan
    equal = sum(2 * block * (module.d_out + module.d_in) for module in plan.modules)
    assert len(plan.modules) == 210
    assert 0.99 * equal < plan.totals.factor_bytes <= equal
