"""The models, the JSON schema made from them, and the reference page."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from armor_recipes.modifiers import config_types
from armor_recipes.recipe import CalibrationSpec, ModelSpec, ModifierConfig, json_schema, reference_markdown, schema
from armor_recipes.recipe.stages import STAGE
from tests.support.recipes import REGISTRY, PruneConfig, load

PAGE = Path(__file__).parents[2] / "docs" / "recipe.md"
MODELS = [
    value
    for value in vars(schema).values()
    if isinstance(value, type) and issubclass(value, BaseModel) and value is not BaseModel
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_model_is_frozen_strict_and_described(model: type[BaseModel]) -> None:
    assert model.__doc__
    assert model.model_config["frozen"] is True
    assert model.model_config["extra"] == "forbid"
    assert model.model_config["strict"] is True
    for name, field in model.model_fields.items():
        assert field.title, name
        assert field.description, name
        assert field.description.endswith("."), name


def test_all_models_are_tested() -> None:
    assert {"ModelSpec", "CalibrationSpec", "OutputSpec", "EvaluationSpec", "ModifierConfig", "AtMost"} <= {
        m.__name__ for m in MODELS
    }


def test_required_sections_have_no_default() -> None:
    assert schema.Sections.model_fields["model"].is_required()
    assert schema.Sections.model_fields["output"].is_required()
    assert CalibrationSpec.model_fields["dataset"].is_required()
    assert ModifierConfig.model_fields["targets"].is_required()


def test_python_users_may_write_lists_and_single_names() -> None:
    assert PruneConfig(targets=["a", "b"]).targets == ("a", "b")  # type: ignore[arg-type]
    assert PruneConfig(targets="Linear").targets == ("Linear",)  # type: ignore[arg-type]
    mix = CalibrationSpec(dataset=[{"dataset": "d", "weight": 1}])  # type: ignore[arg-type]
    assert isinstance(mix.dataset, tuple)


def test_models_cannot_be_changed() -> None:
    spec = ModelSpec(id="m")
    with pytest.raises(ValidationError, match="frozen"):
        spec.id = "n"


def test_json_schema_names_sections_stages_and_kinds() -> None:
    whole = json_schema(REGISTRY)
    assert set(whole["properties"]) == {"extends", "remove", "vars", *schema.Sections.model_fields}
    assert whole["additionalProperties"] is False
    stage = whole["patternProperties"][f"{STAGE}$"]
    modifiers = stage["patternProperties"]["_modifiers$"]["anyOf"][0]
    patterns = list(modifiers["patternProperties"])
    assert any(re.search(pattern, "ARMORModifier@mlp") for pattern in patterns)
    assert not any(
        re.search(pattern, name)
        for pattern in patterns
        for name in ("ArmorModifier", "ARMORModifier@", "XARMORModifier")
    )


def test_every_reference_of_the_json_schema_leads_somewhere() -> None:
    whole = json_schema(REGISTRY)

    def references(node: Any) -> list[str]:
        if isinstance(node, dict):
            own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
            return own + [found for child in node.values() for found in references(child)]
        return [found for child in node for found in references(child)] if isinstance(node, list) else []

    found = references(whole)
    assert found
    assert all(reference.removeprefix("#/$defs/") in whole["$defs"] for reference in found)


def test_a_modifiers_calibration_may_be_partial_and_the_default_may_not() -> None:
    definitions = json_schema(REGISTRY)["$defs"]
    assert definitions["CalibrationSpec"]["required"] == ["dataset"]
    assert "required" not in definitions["PartialCalibration"]
    assert definitions["PruneConfig"]["properties"]["calibration"]["anyOf"][0] == {"$ref": "#/$defs/PartialCalibration"}


def test_json_schema_without_modifiers() -> None:
    assert json_schema({})["$defs"]["ModelSpec"]["required"] == ["id"]


def test_the_reference_names_every_key_of_every_model() -> None:
    text = reference_markdown(REGISTRY)
    for model in [*MODELS, *REGISTRY.values()]:
        assert all(f"| `{name}` |" in text for name in model.model_fields)
    assert "| `block_size` | whole number, [whole number, whole number] or `auto` | `128` | Block size. |" in text
    assert "| `targets` | text or list of text | **required** |" in text


def test_the_example_of_the_page_is_a_recipe(tmp_path: Path) -> None:
    example = PAGE.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0]
    assert [entry.name for entry in load(tmp_path, example).modifiers] == ["ARMORModifier", "ARMORModifier@mlp"]


def test_the_page_holds_the_generated_reference() -> None:
    assert PAGE.read_text(encoding="utf-8").endswith(reference_markdown(config_types()))
