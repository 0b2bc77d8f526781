"""Errors of several checks, told as one; and what runs out, as errors of our own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from armor_recipes.errors import ArmorError, ResourceError
from armor_recipes.exhaustion import what_ran_out


class Refusals:
    """What several checks refuse. Each check is made whatever those before it found; then all is told at once."""

    def __init__(self) -> None:
        self.found: list[ArmorError] = []

    def __bool__(self) -> bool:
        return bool(self.found)

    @contextmanager
    def noted(self, where: str = "") -> Iterator[None]:
        """Note the error that the block ends with, `where` before it; what is no error of ours goes on up."""
        try:
            yield
        except ArmorError as error:
            self.found.append(type(error)(f"{where}: {error}") if where else error)

    def tell(self) -> NoReturn:
        """Raise what was noted: in the class of the first, whose exit code counts, with the messages of all, a line each."""
        first = self.found[0]
        if len(self.found) == 1:
            raise first
        lines = dict.fromkeys(line for error in self.found for line in str(error).split("\n"))
        raise type(first)("\n".join(lines)) from first


@contextmanager
def resource_errors() -> Iterator[None]:
    """Out of memory or disk, as errors of our own."""
    try:
        yield
    except Exception as error:
        what = "" if isinstance(error, ArmorError) else what_ran_out(error)
        if what:
            raise ResourceError(what) from error
        raise
