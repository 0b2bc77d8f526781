"""`vars`, `remove` and `metadata`."""

from __future__ import annotations

from pathlib import Path

import pytest

from armor_recipes.errors import RecipeError
from armor_recipes.modifiers.registry import config_types
from armor_recipes.recipe import load_recipe

BASE = """
metadata: {title: A test, tested_on: SmolLM2, expected: 39.4 on the held-out text}
vars:
  block: {default: 32, type: int, description: side of all blocks}
  part: mlp
  text: builtin:random-tokens
model: builtin:stdlib-llama
calibration: {dataset: "${text}", samples: 4, sequence_length: 16}
prune_stage:
  armor_modifiers:
    ARMORModifier: {targets: "re:.*${part}.*_proj", block_size: "${block}"}
    BlockRefineModifier: {epochs: 2}
late_stage:
  armor_modifiers:
    QuantizationModifier: {targets: Linear}
output: {path: out}
"""


@pytest.fixture
def base(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE.replace("QuantizationModifier", "MagnitudeModifier"))
    return tmp_path / "base.yaml"


def load(*files: Path, **options: tuple[str, ...]):  # type: ignore[no-untyped-def]
    return load_recipe(files, registry=config_types(), overrides=options.get("sets", ()))


def above(base: Path, text: str) -> Path:
    file = base.with_name("top.yaml")
    file.write_text(f"extends: base.yaml\n{text}")
    return file


def test_variables_are_typed_values_and_letters_in_texts(base: Path) -> None:
    recipe = load(base)
    armor = recipe.modifiers[0].config
    assert armor.block_size == 32
    assert armor.targets == ("re:.*mlp.*_proj",)
    assert recipe.calibration.dataset == "builtin:random-tokens"
    assert "vars" not in recipe.resolved
    assert recipe.resolved["prune_stage"]["armor_modifiers"]["ARMORModifier"]["block_size"] == 32


def test_other_values_by_set_and_by_files_above_keep_the_type(base: Path) -> None:
    sets = ("vars.block=16", "vars.part=self_attn")
    recipe = load(base, sets=sets)
    assert recipe.modifiers[0].config.block_size == 16
    assert recipe.modifiers[0].config.targets == ("re:.*self_attn.*_proj",)
    assert load(above(base, "vars: {block: 16, part: self_attn}\n")).hash() == recipe.hash() != load(base).hash()
    with pytest.raises(RecipeError, match=r"vars\.block: is 'many', and its type is int"):
        load(base, sets=("vars.block=many",))
    with pytest.raises(RecipeError, match=r"vars\.block: is True, and its type is int"):
        load(base, sets=("vars.block=true",))


def test_a_list_stands_where_it_is_alone(base: Path) -> None:
    text = "vars: {sides: [16, 32]}\nprune_stage: {armor_modifiers: {ARMORModifier: {block_size: '${sides}', seed: '${block}'}}}\n"
    assert load(above(base, text)).modifiers[0].config.block_size == (16, 32)
    inside = text.replace("'${sides}'", "'a${sides}'")
    with pytest.raises(RecipeError, match="no single value"):
        load(above(base, inside))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vars: {unused: 1}\n", r"top.yaml:2: vars.unused: is used nowhere"),
        (
            "vars: {blok: 1}\nseed_stage: {}\nmodel: '${blocc}'\n",
            r"\$\{blocc\} is no variable of this recipe; nearest variables?: bloc?k",
        ),
        ("vars: {block: null}\n", r"vars.block: has no value: give --set vars.block=VALUE"),
        ("vars: {block: {type: integer, default: 3}}\n", r"types are int, float, str, bool"),
        ("vars: {block: {default: 3, kind: int}}\n", r"vars.block.kind: unknown key"),
        ("vars: {1st: 3}\n", r"letters, digits and _"),
        ("vars: 3\n", r"must be a mapping of names to values"),
    ],
)
def test_what_is_wrong_with_variables_is_told(base: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(above(base, text))


def test_two_dollars_are_one(base: Path) -> None:
    recipe = load(above(base, "output: {path: 'out/$${block}'}\n"))
    assert recipe.output.path == "out/${block}"


def test_inherited_modifiers_stages_and_sections_are_removed(base: Path) -> None:
    recipe = load(above(base, "remove: [prune_stage.armor_modifiers.BlockRefineModifier, late_stage, metadata]\n"))
    assert [entry.name for entry in recipe.modifiers] == ["ARMORModifier"]
    assert recipe.stages == ("prune_stage",)
    assert recipe.metadata is None
    again = load(
        above(
            base,
            "remove: late_stage\nlate_stage: {armor_modifiers: {WandaPruningModifier: {targets: Linear, pattern: '2:4'}}}\n",
        )
    )
    assert again.modifiers[-1].name == "WandaPruningModifier"
    other = base.with_name("other.yaml")
    other.write_text("remove: late_stage\n")
    assert load(base, other).stages == ("prune_stage",)


@pytest.mark.parametrize("path", ["late_stag", "prune_stage.armor_modifiers.ARMOR", "[[a]]", "''"])
def test_what_is_not_there_cannot_be_removed(base: Path, path: str) -> None:
    with pytest.raises(RecipeError, match=r"top.yaml:2: remove: .* is no key of the recipes before this one"):
        load(above(base, f"remove: {path}\n"))


def test_nothing_can_be_removed_of_nothing(base: Path) -> None:
    base.write_text("remove: late_stage\n" + base.read_text())
    with pytest.raises(RecipeError, match="there is no recipe before this one"):
        load(base)


def test_metadata_is_read_and_changes_no_hash(base: Path) -> None:
    recipe = load(base)
    assert recipe.metadata.title == "A test"
    assert recipe.metadata.tested_on == ("SmolLM2",)
    assert recipe.hash() == load(above(base, "remove: metadata\n")).hash()
