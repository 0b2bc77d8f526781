"""`armor schema`: the JSON schema of a recipe."""

from __future__ import annotations

import json


def schema_command() -> None:
    """Print the JSON schema of a recipe, every registered modifier included (for editors: armor schema > recipe.schema.json)."""
    from armor_recipes.modifiers import config_types
    from armor_recipes.recipe import json_schema

    print(json.dumps(json_schema(config_types()), indent=2))
