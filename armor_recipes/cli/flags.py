"""Flags that both commands have, and checks of values."""

from __future__ import annotations

from typing import Annotated

import typer

from armor_recipes.version import __version__


def not_empty(value: str | None) -> str | None:
    """The value. Raises BadParameter, which names the flag, where it is given without a text."""
    if value == "":
        raise typer.BadParameter("must not be empty")
    return value


def show_version(asked: bool) -> None:
    """Print the release and end, where that is asked for."""
    if asked:
        print(f"armor-recipes {__version__}")
        raise typer.Exit


Version = Annotated[
    bool, typer.Option("--version", callback=show_version, is_eager=True, help="Show the release and stop.")
]
