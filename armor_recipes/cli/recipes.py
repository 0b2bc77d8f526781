"""`armor recipes`: the recipes that come with the package."""

from __future__ import annotations

from typing import Annotated

import typer


def recipes_command(
    name: Annotated[str | None, typer.Argument(help="Print this recipe instead of the list.")] = None,
) -> None:
    """List the built-in recipes with the first line of each, or print one (armor recipes quickstart)."""
    from armor_recipes.errors import RecipeError
    from armor_recipes.recipe import builtin_recipes
    from armor_recipes.run.job import builtin_recipe_dir

    folder = builtin_recipe_dir()
    known = builtin_recipes(folder)
    if name is None:
        for recipe in known:
            first = (folder / f"{recipe}.yaml").read_text(encoding="utf-8").splitlines()[0]
            print(f"{recipe:<24} {first.lstrip('# ')}")
        return
    if name not in known:
        raise RecipeError(f"there is no built-in recipe {name!r}; there are: {', '.join(known)}")
    print((folder / f"{name}.yaml").read_text(encoding="utf-8"), end="")
