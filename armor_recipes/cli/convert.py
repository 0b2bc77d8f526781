"""`armor convert FILE`: a recipe of llm-compressor as one of ours."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def convert_command(
    file: Annotated[
        Path, typer.Argument(help="A recipe of llm-compressor: YAML, JSON, Markdown, or Python with `recipe = [...]`.")
    ],
) -> None:
    """Print a recipe of llm-compressor as one of ours (armor convert quantise.py > recipe.yaml). Python is parsed and never run."""
    from armor_recipes.modifiers import config_types
    from armor_recipes.recipe import convert_recipe

    found = convert_recipe(file, registry=config_types())
    for note in found.notes:
        print(note, file=sys.stderr)
    print(f"# From {file.name}.")
    print(found.yaml, end="")
