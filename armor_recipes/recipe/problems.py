"""Where a problem is, how it is worded, and the list in which all problems of a recipe are gathered."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from armor_recipes.errors import RecipeError

LONGEST_VALUE = 80


@dataclass(frozen=True, slots=True)
class Mark:
    """A place: `source` is a file as the user named it, or an argument such as `--set a.b=1`; `line` counts from 1.

    `folder` is what data files named at this place are relative to.
    """

    source: str
    line: int | None
    folder: Path

    def __str__(self) -> str:
        return printable(self.source if self.line is None else f"{self.source}:{self.line}")


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a recipe: where, at which key (a path of keys, may be empty), and what."""

    mark: Mark
    path: tuple[str, ...]
    text: str

    def __str__(self) -> str:
        keys = ".".join(shorten(printable(key)) for key in self.path)
        return ": ".join(part for part in (str(self.mark), keys, printable(self.text)) if part)


@dataclass(slots=True)
class Problems:
    """All problems of a recipe, shown together."""

    found: list[Problem] = field(default_factory=list)
    seen: set[tuple[Mark, tuple[str, ...], str]] = field(default_factory=set)

    def add(self, mark: Mark, path: Iterable[str], text: str) -> None:
        """Note a problem; the same text at the same place and key twice is one problem."""
        problem = Problem(mark, tuple(path), text)
        key = (mark, problem.path[-1:], text)
        if key not in self.seen:
            self.seen.add(key)
            self.found.append(problem)

    def raise_if_any(self) -> None:
        """Raise RecipeError with every problem, one a line, sorted by file and line; arguments come last."""
        if self.found:
            ordered = sorted(self.found, key=lambda p: (p.mark.line is None, p.mark.source, p.mark.line or 0, p.path))
            raise RecipeError("\n".join(str(problem) for problem in ordered))


def printable(text: str) -> str:
    """Return `text` with control characters and lone surrogates escaped, so that it prints on one line anywhere."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def shorten(text: str, *, limit: int = LONGEST_VALUE) -> str:
    """Return `text` cut to `limit` characters, the cut shown by an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def show(value: object) -> str:
    """Return `value` as it would be written in Python, cut to 80 characters."""
    if isinstance(value, str):
        value = value[: LONGEST_VALUE + 1]
    return shorten(repr(value))


def nearest(word: str, known: Iterable[str], *, noun: str) -> str:
    """Return the half-sentence that helps after an unknown `word`: the nearest known ones, or all of them.

    `noun` is what the known words are ("valid key", "registered modifier").
    """
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(word[:LONGEST_VALUE], known, n=3, cutoff=0.6)
    if close:
        return f"nearest {noun}{'s' if len(close) > 1 else ''}: {', '.join(close)}"
    return f"{noun}s: {', '.join(known) or 'none'}"
