"""Plain data against other plain data: every value that differs, by the path of keys to it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from armor_recipes.recipe.problems import printable
from armor_recipes.recipe.yaml_source import MAX_DEPTH

NOTHING = "nothing"
"""What is said of a value where there is none."""


class Differing(NamedTuple):
    """A value that two have differently, or one alone: the path of keys, and both as JSON, in which 1, 1.0 and true differ."""

    path: tuple[str, ...]
    first: str
    second: str

    @property
    def key(self) -> str:
        """The path in one word, fit to be printed."""
        return printable(".".join(self.path))


def differing(first: Any, second: Any) -> Iterator[Differing]:
    """What differs, in the order of `first`, and then what only `second` has. Nothing deeper than recipes may be is looked at."""
    one, two = (dict(leaves(value)) for value in (first, second))
    for path in dict.fromkeys([*one, *two]):
        said = Differing(path, one.get(path, NOTHING), two.get(path, NOTHING))
        if said.first != said.second:
            yield said


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Every value that holds no other, by the path of keys to it, as JSON; `…` where recipes may not be so deep."""
    inner = dict(value) if isinstance(value, Mapping) else dict(enumerate(value)) if isinstance(value, list) else {}
    if not inner or len(path) == MAX_DEPTH:
        yield path, "…" if inner else printable(json.dumps(value, ensure_ascii=False))
        return
    for key, child in inner.items():
        yield from leaves(child, (*path, str(key)))


def of_the_run(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A resolved recipe without what it says of itself, and where the output goes."""
    kept, output = {key: value for key, value in recipe.items() if key != "metadata"}, recipe.get("output")
    return {**kept, "output": {k: v for k, v in output.items() if k != "path"}} if isinstance(output, dict) else kept
