"""`armor recipes`: the recipes that come with the package."""

from __future__ import annotations

import shutil
import textwrap
from itertools import takewhile
from typing import Annotated

import typer

from armor_recipes.cli.completion import complete_names


def recipes_command(
    name: Annotated[
        str | None, typer.Argument(help="Print this recipe instead of the list.", autocompletion=complete_names)
    ] = None,
) -> None:
    """List the built-in recipes with what each is for, or print one (armor recipes quickstart)."""
    from armor_recipes.errors import RecipeError
    from armor_recipes.recipe import builtin_recipes
    from armor_recipes.run.job import builtin_recipe_dir

    folder = builtin_recipe_dir()
    known = builtin_recipes(folder)
    if name is None:
        width = min(shutil.get_terminal_size().columns, 120)
        for recipe in known:
            told = _first_paragraph((folder / f"{recipe}.yaml").read_text(encoding="utf-8"))
            print(recipe, *textwrap.wrap(told, width, initial_indent="  ", subsequent_indent="  "), sep="\n")
        return
    if name not in known:
        raise RecipeError(f"there is no built-in recipe {name!r}; there are: {', '.join(known)}")
    print((folder / f"{name}.yaml").read_text(encoding="utf-8"), end="")


def _first_paragraph(text: str) -> str:
    """The comment that a recipe begins with, up to an empty line of it."""
    return " ".join(
        line.lstrip("# ") for line in takewhile(lambda line: line.strip("# ") and line[0] == "#", text.splitlines())
    )
