"""Recipes of llm-compressor in Python, and what `armor convert` writes in other words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from armor_recipes.errors import RecipeError
from armor_recipes.recipe import Converted, ModifierConfig, convert_recipe, load_recipe
from tests.support.recipes import PruneConfig, QuantConfig, write


class DampedConfig(PruneConfig):
    """A modifier whose field older recipes call otherwise."""

    dampening_frac: float = 0.01


class ScaledConfig(ModifierConfig):
    """A modifier that only scales, by default everywhere."""

    targets: tuple[str, ...] = ("Linear",)
    mappings: tuple[dict[str, Any], ...] = ()


REGISTRY: dict[str, type[ModifierConfig]] = {
    "GPTQModifier": DampedConfig,
    "AWQModifier": ScaledConfig,
    "QuantizationModifier": QuantConfig,
}

SCRIPT = """
import os
from llmcompressor import oneshot

MODEL_ID = "org/model"
SAMPLES = 256
model = AutoModelForCausalLM.from_pretrained(MODEL_ID, torch_dtype="auto")
ds = load_dataset("org/text", split=f"train[:{SAMPLES}]").map(lambda row: row)
LINEAR = ["Linear"]
COMMON = {"seed": 3, "ignore": ["lm_head"] + [r"re:.*gate$"]}
os.environ["NEVER"] = "run"
raise SystemExit("this file is never run")
recipe = [
    AWQModifier(scheme="W4A16", targets=LINEAR, mappings=[AWQMapping("re:.*norm$", ["re:.*q_proj$"])]),
    [GPTQModifier(targets=LINEAR, percdamp=0.02, **COMMON)],
    GPTQModifier(targets="re:.*mlp.*", tolerance=1e-3, requires_calibration_data=True),
]
oneshot(
    model=model, dataset=ds, recipe=recipe, max_seq_length=2048, num_calibration_samples=SAMPLES, output_dir="out/x"
)
"""


def converted(folder: Path, text: str, name: str = "quantise.py") -> Converted:
    """What a file becomes."""
    return convert_recipe(write(folder, text, name), registry=REGISTRY)


def refusal(folder: Path, text: str) -> str:
    """Why a Python file is refused, without the folder."""
    with pytest.raises(RecipeError) as caught:
        converted(folder, text)
    return str(caught.value).replace(f"{folder}/", "")


def test_a_script_becomes_a_recipe(tmp_path: Path) -> None:
    found = converted(tmp_path, SCRIPT)
    assert yaml.safe_load(found.yaml) == {
        "model": {"id": "org/model"},
        "calibration": {"sequence_length": 2048, "samples": {"at_most": 256}},
        "output": {"path": "out/x"},
        "default_stage": {
            "default_modifiers": {
                "AWQModifier": {"mappings": [{"smooth_layer": "re:.*norm$", "balance_layers": ["re:.*q_proj$"]}]},
                "QuantizationModifier": {"scheme": "W4A16", "targets": ["Linear"]},
                "GPTQModifier": {
                    "targets": ["Linear"],
                    "dampening_frac": 0.02,
                    "seed": 3,
                    "ignore": ["lm_head", "re:.*gate$"],
                },
                "GPTQModifier@2": {"targets": "re:.*mlp.*", "tolerance": 0.001},
            }
        },
    }
    notes = [note.replace(f"{tmp_path}/", "") for note in found.notes]
    assert notes[0].startswith(
        "quantise.py:19: dataset is not read (`load_dataset('org/text', split=f'train[:{SAMPLES}]')"
    )
    assert notes[0].endswith("give --set calibration.dataset=VALUE")
    assert notes[1:3] == [
        "quantise.py:14: scheme, targets of AWQModifier are fields of QuantizationModifier now",
        "quantise.py:15: percdamp of GPTQModifier is dampening_frac now",
    ]
    assert "requires_calibration_data" in notes[3]


def test_what_it_becomes_is_a_recipe(tmp_path: Path) -> None:
    made = write(tmp_path, converted(tmp_path, SCRIPT).yaml, "made.yaml")
    recipe = load_recipe([made], registry=REGISTRY, overrides=["calibration.dataset=d"])
    assert [entry.name for entry in recipe.modifiers][2:] == ["GPTQModifier", "GPTQModifier@2"]
    again = converted(tmp_path, made.read_text(), "made.yaml")
    assert again.notes == ()
    assert yaml.safe_load(again.yaml) == yaml.safe_load(made.read_text())


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("recipe = QuantizationModifier(targets=['a'])", ["a"]),
        ("QuantizationModifier(targets=['a'])", ["a"]),
        ("[QuantizationModifier(targets=['a'])] + []", ["a"]),
        ("oneshot(recipe=[m.QuantizationModifier(targets=['a'])])", ["a"]),
        ("recipe = '''\ndefault_stage:\n  default_modifiers:\n    QuantizationModifier: {targets: [a]}\n'''", ["a"]),
        ("recipe = {'default_stage': {'default_modifiers': {'QuantizationModifier': dict(targets=['a'])}}}", ["a"]),
        ("def main():\n  x = 'b'\n  x = 'a'\n  recipe = [QuantizationModifier(targets=[x])]", ["a"]),
        ("recipe = [QuantizationModifier(targets=[QuantizationStrategy.TENSOR_GROUP])]", ["tensor_group"]),
        ("recipe = [QuantizationModifier(targets=[torch.float8_e4m3fn])]", ["torch.float8_e4m3fn"]),
        ("recipe = [vLLMQuantizationModifier(targets=['a'])]", ["a"]),
    ],
)
def test_forms_of_recipes_in_python(tmp_path: Path, text: str, targets: list[str]) -> None:
    (group,) = yaml.safe_load(converted(tmp_path, text).yaml)["default_stage"].values()
    assert group == {"QuantizationModifier": {"targets": targets}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1", "quantise.py:1: the file has no `recipe = [...]`"),
        ("recipe = [AModifier()]\nrecipe = [BModifier()]", "the file has 2 recipes (lines 1, 2); keep one of them"),
        ("recipe = [\n f()]", "quantise.py:2: `f()` is no modifier; the file is not run"),
        ("recipe = [QuantizationModifier('a')]", "QuantizationModifier has an argument without a name"),
        ("recipe = [QuantizationModifier(targets=[x])]", "x is not assigned a value above"),
        ("recipe = [QuantizationModifier(targets=[a.b])]", "`a.b` is no literal; the file is not run"),
        ("recipe = [QuantizationModifier(targets=[i for i in 'a'])]", "`[i for i in 'a']` is no literal"),
        ("recipe = [QuantizationModifier(seed=1j)]", "`1j` is no literal"),
        ("recipe = [QuantizationModifier(**3)]", "** takes a mapping"),
        ("recipe = []\nrecipe += [QuantizationModifier()]", "quantise.py:2: the recipe is changed here after it was made"),
        ("recipe = []\nrecipe.append(1)", "quantise.py:2: the recipe is changed here after it was made"),
        ("recipe = 'recipe.yaml'", "neither a list of modifiers nor YAML in a text (a path: convert that file)"),
        ("recipe = [", "quantise.py:1: not valid Python: '[' was never closed"),
        ("recipe = [AutoRoundModifier()]", "llm-compressor has AutoRoundModifier, which is not here"),
        ("recipe = [\n QuantizationModifier(\n  seed=-1, targets='x')]", "quantise.py:3: default_stage.default_modifiers"),
        ("a = b\nb = a\nrecipe = [QuantizationModifier(targets=a)]", "b is not assigned a value above"),
        (
            "a0 = ['x']\n" + "".join(f"a{i + 1} = a{i} + a{i}\n" for i in range(40)) + "recipe = QuantizationModifier(targets=a40)",
            "names expand to more than 10,000 values",
        ),
        ("recipe = " + "[" * 500, "not valid Python: too many nested parentheses"),
        ("recipe = " + "-" * 90_000 + "1", "quantise.py:1"),
        ("a = a\n" * 3 + "recipe = a", "a is not assigned a value above"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_told_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    assert message in refusal(tmp_path, text)


def test_oneshot_takes_512_samples_where_it_is_not_told(tmp_path: Path) -> None:
    call = "oneshot(dataset='d', recipe=[QuantizationModifier(targets='a')]{})"
    found = [
        yaml.safe_load(converted(tmp_path, call.format(more)).yaml)["calibration"]
        for more in ("", ", num_calibration_samples=n()")
    ]
    assert found == [{"dataset": "d", "samples": {"at_most": 512}}, {"dataset": "d"}]


def test_other_files_are_converted_too(tmp_path: Path) -> None:
    text = "---\nx_stage_0: {y_modifiers: [{GPTQModifier: {percdamp: 0.1, targets: [a]}}]}\n---\n"
    assert yaml.safe_load(converted(tmp_path, text, "card.md").yaml) == {
        "x_0_stage": {"y_modifiers": [{"GPTQModifier": {"dampening_frac": 0.1, "targets": ["a"]}}]}
    }
    with pytest.raises(RecipeError, match="no such file"):
        convert_recipe(tmp_path / "absent.py", registry=REGISTRY)


def test_variables_stay_in_what_is_converted(tmp_path: Path) -> None:
    text = "vars: {rate: 0.1}\na_stage: {b_modifiers: {GPTQModifier: {percdamp: '${rate}', targets: [a]}}}\n"
    made = yaml.safe_load(converted(tmp_path, text, "own.yaml").yaml)
    assert made["vars"] == {"rate": {"default": 0.1}}
    assert made["a_stage"]["b_modifiers"]["GPTQModifier"]["dampening_frac"] == "${rate}"


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    position=st.integers(0, len(SCRIPT) - 1),
    removed=st.integers(0, 12),
    inserted=st.text("()[]{}*=,'\"ab1.\n @:", max_size=6),
)
def test_an_edited_script_is_refused_with_its_place_or_read(
    tmp_path: Path, position: int, removed: int, inserted: str
) -> None:
    text = SCRIPT[:position] + inserted + SCRIPT[position + removed :]
    try:
        found, lines = converted(tmp_path, text).yaml, []
    except RecipeError as error:
        found, lines = "{}", str(error).split("\n")
    assert all(line.startswith(f"{tmp_path}/quantise.py") for line in lines)
    assert isinstance(yaml.safe_load(found), dict)
