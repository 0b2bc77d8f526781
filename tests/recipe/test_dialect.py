"""Recipes in llm-compressor's words: what its files hold besides, other kinds of files, and names that are not here."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from armor_recipes.errors import RecipeError
from armor_recipes.recipe import Recipe, load_recipe
from armor_recipes.recipe.llmcompressor import FIELDS, MODIFIERS, not_here
from tests.support.recipes import REGISTRY, QuantConfig, errors, load, write

FLAGS: dict[str, Any] = {"model": "m", "output": "o"}
PLAIN = "default_stage: {default_modifiers: {QuantizationModifier: {targets: [Linear], ignore: [lm_head]}}}"
WRITTEN = """
args: {}
default_stage:
  run_type: oneshot
  default_modifiers:
    QuantizationModifier:
      targets: !!python/tuple [Linear]
      ignore: [lm_head]
      bypass_divisibility_checks: false
      requires_calibration_data: false
      group: null
      index: 0
      start: 0.0
      end: null
      initialized_: true
      seed: !!python/object/apply:llmcompressor.sentinel.Sentinel [not_provided, sentinel.py]
"""


def loaded(folder: Path, text: str, name: str) -> Recipe:
    """A file of any name, with model and output beside it."""
    return load_recipe([write(folder, text, name)], registry=REGISTRY, **FLAGS)


def test_what_is_written_beside_a_checkpoint_is_the_recipe_that_it_was(tmp_path: Path) -> None:
    recipe = load(tmp_path, WRITTEN, **FLAGS)
    assert recipe.hash() == load(tmp_path, PLAIN, **FLAGS).hash()
    assert recipe.notes == (
        "left out of the recipe, where llm-compressor keeps account of it and nothing depends on it: args, "
        "bypass_divisibility_checks, end, group, index, initialized_, requires_calibration_data, run_type, start",
    )
    assert load(tmp_path, PLAIN, **FLAGS).notes == ()


def test_a_word_of_an_enumeration_is_read_and_nothing_is_called(tmp_path: Path) -> None:
    tag = "!!python/object/apply:compressed_tensors.quantization.quant_args.QuantizationType [int]"
    text = PLAIN.replace("ignore: [lm_head]", f"scheme: {tag}")
    config = load(tmp_path, text, **FLAGS).modifiers[0].config
    assert isinstance(config, QuantConfig)
    assert config.scheme == "int"
    for refused in ("!!python/object/apply:os.system [ls]", "!!python/object:a.B {}", "!!python/name:os.system ''"):
        (line,) = errors(tmp_path, PLAIN.replace("[lm_head]", refused), **FLAGS)
        assert "the YAML tag" in line
        assert "is refused" in line


SMILE = {"x_modifiers": {"QuantizationModifier": {"targets": ["\U0001f600"]}}}
YAML = 'default_stage: {x_modifiers: {QuantizationModifier: {targets: ["\U0001f600"]}}}'


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("recipe.json", '{\n\t"default_stage":' + json.dumps(SMILE) + "}"),
        ("README.md", f"\n---\n{YAML}\n---\n# Title\n--- not: [yaml\n"),
        ("README.MD", f"+++\n{YAML}\n+++\n"),
    ],
)
def test_json_and_front_matter(tmp_path: Path, name: str, text: str) -> None:
    assert loaded(tmp_path, text, name).modifiers[0].config.targets == ("\U0001f600",)


def test_a_backslash_in_json_stays_one(tmp_path: Path) -> None:
    text = json.dumps(
        {"a_stage": {"b_modifiers": {"QuantizationModifier": {"targets": ["re:\\\\ud83d\\\\ude00\\\\d"]}}}}
    )
    found = loaded(tmp_path, text, "recipe.json").modifiers[0].config.targets
    assert found == tuple(json.loads(text)["a_stage"]["b_modifiers"]["QuantizationModifier"]["targets"])


def test_lines_of_front_matter_are_those_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "\n---\nfoo: 1\n" + PLAIN + "\n---\n", "card.md")
    with pytest.raises(RecipeError, match=r"card\.md:3: foo: unknown key"):
        load_recipe([path], registry=REGISTRY, **FLAGS)
    with pytest.raises(RecipeError, match=r"plain\.md: has no front matter: put the recipe between"):
        loaded(tmp_path, "# Title\n", "plain.md")
    with pytest.raises(RecipeError, match=r"recipe\.py: is Python and not run: `armor convert .*recipe\.py` makes"):
        loaded(tmp_path, "recipe = []", "recipe.py")


def test_stages_of_a_second_recipe_are_numbered(tmp_path: Path) -> None:
    group = "{default_modifiers: {QuantizationModifier: {targets: [a]}}}"
    text = f"default_stage_0: {group}\ndefault_stage_1: {group}\n"
    assert load(tmp_path, text, **FLAGS).stages == ("default_0_stage", "default_1_stage")
    (line,) = errors(tmp_path, f"{text}default_0_stage: {group}\n", **FLAGS)
    assert "recipe.yaml:1: default_stage_0: it means default_0_stage, which is there already" in line


LEGACY = [
    ("percdamp: 0.02", "llm-compressor has renamed it: write `dampening_frac: 0.02`"),
    (
        "quantize: true",
        "it quantised the weights, too: put a QuantizationModifier or GPTQModifier with a `scheme` after",
    ),
    ("sequential_update: 3", "whether layers are compressed one after the other"),
    ("offload_hessians: true", "it moved Hessians to the CPU's memory, which changes no number: remove it"),
    ("batched_quantization: 4", "how many weights are quantised at once, which changes no number: remove it"),
    ("bypass_divisibility_checks: true", "it lets groups pass that do not divide the columns"),
    ("algorithm: log_equalization", "only llm-compressor's `smoothquant` is done here"),
    ('mask_structure: "1:4"', "what is kept: write `pattern: 3:4`"),
    ('mask_structure: "0:0"', "this modifier keeps N of every M: write `pattern: N:M`"),
    ("sparsity: 0.5", "write `pattern: 2:4` for half of them"),
    ("start: 2.0", "a step of a training run; every modifier here acts once: remove it"),
    ("weight_observer: mse", "a field of llm-compressor's QuantizationModifier that is not here: remove it"),
]


@pytest.mark.parametrize(("field", "text"), LEGACY)
def test_legacy_fields_are_named(tmp_path: Path, field: str, text: str) -> None:
    (line,) = errors(tmp_path, PLAIN.replace("ignore: [lm_head]", field), **FLAGS)
    name = field.partition(":")[0]
    at = f"default_stage.default_modifiers.QuantizationModifier.{name}: QuantizationModifier here has no such field; "
    assert at in line
    assert text in line


def test_null_is_a_field_that_was_not_given(tmp_path: Path) -> None:
    recipe = load(tmp_path, PLAIN.replace("ignore: [lm_head]", "weight_observer: null"), **FLAGS)
    assert "weight_observer" not in recipe.resolved["default_stage"]["default_modifiers"]["QuantizationModifier"]
    (line,) = errors(tmp_path, PLAIN.replace("ignore:", "ignored:").replace("[lm_head]", "null"), **FLAGS)
    assert "unknown key; nearest valid key: ignore" in line


def test_modifiers_that_are_not_here_are_named_truly(tmp_path: Path) -> None:
    (line,) = errors(tmp_path, PLAIN.replace("QuantizationModifier", "AutoRoundModifier"), **FLAGS)
    assert line.endswith(
        "llm-compressor has AutoRoundModifier, which is not here: install `armor-recipes[llmcompressor]` to run it as a step, "
        "or take QuantizationModifier, which comes closest here"
    )
    assert not_here("REAPPruningModifier", REGISTRY) == (
        "llm-compressor has REAPPruningModifier, which is not here: install `armor-recipes[llmcompressor]` to run it as a step, "
        "or remove it"
    )
    assert not_here("vLLMQuantizationModifier", REGISTRY) == (
        "llm-compressor has renamed vLLMQuantizationModifier: write QuantizationModifier"
    )
    assert not_here("ARMOURModifier", REGISTRY) is None


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("QuIPModifier", {}, "leaves rotations that are made as the model runs, and no modifier here goes on"),
        ("SpinQuantModifier", {"rotations": ["R1", "R4"]}, r"as the model runs \(R1 and R2 lie in the weights\), and"),
        ("SpinQuantModifier", {"rotations": "R3"}, "as the model runs"),
        ("AutoRoundModifier", {"scheme": "W4A16"}, "leaves a quantised model, and no modifier here goes on"),
        ("REAPPruningModifier", {}, "takes experts away"),
        ("SpinQuantModifier", {"rotations": ["R1", "R2"]}, ""),
        ("SpinQuantModifier", {}, ""),
    ],
)
def test_only_what_would_run_is_told_to_be_installed(kind: str, fields: dict[str, object], reason: str) -> None:
    """Beside a modifier of ours; a recipe of llm-compressor's modifiers alone is all run there."""
    alone, mixed = (not_here(kind, REGISTRY, fields, kinds) for kinds in ((), ("ARMORModifier",)))
    assert alone is not None
    assert mixed is not None
    assert "install `armor-recipes[llmcompressor]` to run it as a step" in alone
    assert re.search(reason or r"install `armor-recipes\[llmcompressor\]`", mixed)
    assert ("install" in mixed) == (not reason)


def test_a_list_of_modifiers_is_read_like_a_mapping(tmp_path: Path) -> None:
    items = "{QuantizationModifier: {targets: [a], group: x}}, {QuantizationModifier: {targets: [b]}}"
    text = f"default_stage: {{default_modifiers: [{items}]}}"
    recipe = load(tmp_path, text, **FLAGS)
    assert [entry.name for entry in recipe.modifiers] == ["QuantizationModifier", "QuantizationModifier@2"]
    assert "group" not in recipe.resolved_yaml()


def test_the_table_is_complete() -> None:
    assert len(MODIFIERS) == 13
    assert all(
        FIELDS[name].empty("surely not") is (name in ("requires_calibration_data", "index", "group")) for name in FIELDS
    )
