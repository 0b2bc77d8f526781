"""Checks of flags' values that several commands have."""

from __future__ import annotations

import typer


def not_empty(value: str | None) -> str | None:
    """The value. Raises BadParameter, which names the flag, where it is given without a text."""
    if value == "":
        raise typer.BadParameter("must not be empty")
    return value
