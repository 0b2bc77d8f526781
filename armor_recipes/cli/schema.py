"""`armor schema`: the JSON schema of a recipe."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def schema_command(
    sweep: Annotated[bool, typer.Option("--sweep", help="That of a sweep file instead.")] = False,
) -> None:
    """Print the JSON schema of a recipe, every registered modifier included (for editors: armor schema > recipe.schema.json)."""
    from armor_recipes.modifiers import config_types
    from armor_recipes.recipe import json_schema
    from armor_recipes.recipe.sweep import SweepSpec

    print(json.dumps(SweepSpec.model_json_schema() if sweep else json_schema(config_types()), indent=2))
