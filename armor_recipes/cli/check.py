"""`armor check RECIPE…`: recipes by themselves, as a pre-commit hook wants it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from armor_recipes.cli.loading import loading


def check_command(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="Recipe or sweep files, each for itself.")],
) -> None:
    """Check recipes, and that their locks are of them, without model and data (armor check recipes/quickstart.yaml)."""
    with loading():
        from armor_recipes.recipe.sweep import is_sweep
        from armor_recipes.run.job import read_recipe
        from armor_recipes.run.recipe_lock import check_recipe
        from armor_recipes.run.refusals import Refusals
        from armor_recipes.run.sweep import read_sweep

    refused = Refusals()
    for file in recipes:
        with refused.noted():
            if is_sweep(file):
                print(f"{file}: {len(read_sweep(file).points)} points, all well formed")
                continue
            print(f"{file}: {check_recipe(file, read_recipe(file))}")
    if refused:
        refused.tell()
