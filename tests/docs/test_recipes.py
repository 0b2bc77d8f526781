"""Recipes in the docs load, and the docs know every recipe."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from armor_recipes.modifiers import config_types
from armor_recipes.recipe import json_schema
from armor_recipes.run import prepare
from armor_recipes.run.job import read_recipe
from tests.support.pages import (
    PAGES,
    RECIPES,
    ROOT,
    TUTORIAL,
    Block,
    blocks,
    first_recipe,
    planned_model,
    without_blocks,
)

#: Recipes for the modifiers that how-to/modifier.md makes are tested with them (test_add_a_modifier.py).
YAML = [block for block in blocks("yaml") if block.page.name != "modifier.md"]


def _keys(block: Block) -> dict[str, Any]:
    data = yaml.safe_load(block.text)
    assert isinstance(data, dict)
    return data


def _is_whole(block: Block) -> bool:
    return "extends" in _keys(block) or any(key.endswith("_stage") for key in _keys(block))


def test_there_are_whole_recipes_in_the_docs() -> None:
    assert sum(_is_whole(block) for block in YAML) >= 3


@pytest.mark.parametrize("block", YAML, ids=str)
def test_recipes_of_the_docs_load_and_plan(block: Block, tmp_path: Path, packed: Path) -> None:
    for recipe in RECIPES:
        shutil.copy(recipe, tmp_path)
    (tmp_path / "first.yaml").write_text(first_recipe(), encoding="utf-8")
    text = block.text
    if not _is_whole(block):  # a section: laid over a recipe that has the rest
        text = f"extends: quickstart.yaml\n{text}"
    page = tmp_path / "page.yaml"
    page.write_text(text, encoding="utf-8")
    recipe = read_recipe(page)
    assert recipe.modifiers
    if _is_whole(block):
        model = planned_model(recipe.model.id, tmp_path / "model", packed)
        assert prepare(read_recipe(page, model=model)).plan.layers


def test_the_first_recipe_has_a_remark_for_each_number() -> None:
    numbers = re.findall(r"# (\d+)$", first_recipe(), re.MULTILINE)
    text = TUTORIAL.read_text(encoding="utf-8").split("## A recipe of your own")[1].split("\n## ")[0]
    assert numbers == re.findall(r"^(\d+)\. ", text, re.MULTILINE) == [str(n + 1) for n in range(len(numbers))]


def test_the_readme_has_the_first_recipe_and_no_other() -> None:
    (block,) = blocks("yaml", page=ROOT / "README.md")
    assert yaml.safe_load(block.text) == yaml.safe_load(first_recipe())


def test_every_recipe_is_in_the_table_and_no_other() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(f"[`recipes/{recipe.name}`](../recipes/{recipe.name})" in text for recipe in RECIPES)
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


def _names(schema: Any) -> set[str]:
    """Every key that a JSON schema gives a meaning, at any depth."""
    if isinstance(schema, list):
        return set().union(*map(_names, schema))
    if not isinstance(schema, dict):
        return set()
    properties = schema.get("properties", {})
    return {*properties} | set().union(*map(_names, schema.values()))


def test_every_field_of_the_schema_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8").split("## Reference")[1]
    names = _names(json_schema(config_types()))
    assert len(names) > 100
    assert sorted(name for name in names if f"| `{name}` |" not in page) == []
