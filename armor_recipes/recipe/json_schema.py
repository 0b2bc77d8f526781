"""The JSON schema of a recipe file, for editors: sections, stages, groups, and every registered kind of modifier."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from armor_recipes.recipe.schema import ModifierConfig, Sections
from armor_recipes.recipe.stages import GROUP, STAGE

EXTENDS_TITLE = "Extends"
EXTENDS_DESCRIPTION = "Recipe file, or list of recipe files, that this one is laid over; relative to this file."
REMOVE_DESCRIPTION = (
    "Keys, with dots between, to take out of the recipes that this one is laid over: a stage, a modifier, a section."
)
VARS_DESCRIPTION = (
    "Variables: name to default, or to `{default, type, description}` with a type of `int`, `float`, `str` or `bool`; "
    "`${name}` stands for the value wherever one can, `--set vars.name=VALUE` gives another."
)
PARTIAL = "PartialCalibration"
_REF = "#/$defs/"

Schema = dict[str, Any]


def json_schema(registry: Mapping[str, type[ModifierConfig]]) -> Schema:
    """Return the JSON schema (draft 2020-12) of a recipe that stands alone, with the modifiers of `registry`.

    `model` and `output` are not required in it, since arguments may give them. A file that extends another may leave
    out more.
    """
    models: list[type[BaseModel]] = [Sections, *registry.values()]
    names, definitions = models_json_schema([(model, "validation") for model in models], by_alias=True)
    defs: Schema = definitions["$defs"]
    defs[PARTIAL] = {key: value for key, value in defs["CalibrationSpec"].items() if key != "required"}
    kinds = {kind: names[model, "validation"] for kind, model in registry.items()}
    for reference in kinds.values():
        _use_partial_calibration(defs[reference["$ref"].removeprefix(_REF)])
    sections = defs.pop("Sections")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A recipe of armor-recipes",
        "type": "object",
        "properties": {
            "extends": _extends(),
            "remove": _remove(),
            "vars": _vars(),
            **_with_short_model(sections["properties"]),
        },
        "patternProperties": {f"{STAGE}$": _stage(kinds)},
        "additionalProperties": False,
        "$defs": defs,
    }


def _use_partial_calibration(config: Schema) -> None:
    """Let a modifier's own `calibration` leave out keys: they come from the default."""
    own = config["properties"]["calibration"]
    config["properties"]["calibration"] = {**own, "anyOf": [{"$ref": _REF + PARTIAL}, {"type": "null"}]}


def _with_short_model(properties: Schema) -> Schema:
    """Return the properties of the sections, with `model: NAME` allowed beside the mapping."""
    model = {key: value for key, value in properties["model"].items() if key != "$ref"}
    short = [{"type": "string", "minLength": 1}, {"$ref": f"{_REF}ModelSpec"}]
    return {**properties, "model": {**model, "anyOf": short}}


def _extends() -> Schema:
    file = {"type": "string", "minLength": 1}
    forms = [file, {"type": "array", "items": file, "minItems": 1}]
    return {"title": EXTENDS_TITLE, "description": EXTENDS_DESCRIPTION, "anyOf": forms}


def _remove() -> Schema:
    path = {"type": "string", "minLength": 1}
    forms = [path, {"type": "array", "items": path, "minItems": 1}]
    return {"title": "Remove", "description": REMOVE_DESCRIPTION, "anyOf": forms}


def _vars() -> Schema:
    return {"title": "Variables", "description": VARS_DESCRIPTION, "type": "object"}


def _stage(kinds: Mapping[str, Schema]) -> Schema:
    """Return the schema of a stage: groups, each a mapping from `Kind` or `Kind@name` to fields, or a list of such."""
    named = {f"^{kind}(@[A-Za-z0-9_-]+)?$": {"anyOf": [ref, {"type": "null"}]} for kind, ref in kinds.items()}
    modifiers = {"type": "object", "patternProperties": named, "additionalProperties": False, "minProperties": 1}
    group = {"anyOf": [modifiers, {"type": "array", "items": {**modifiers, "maxProperties": 1}, "minItems": 1}]}
    return {
        "title": "Stage",
        "description": "One pass over the layers; holds groups of modifiers, which run in the order written.",
        "type": "object",
        "patternProperties": {f"{GROUP}$": group},
        "additionalProperties": False,
        "minProperties": 1,
    }
