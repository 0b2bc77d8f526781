"""A recipe given as a Python mapping becomes the same tree that a file becomes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from os import PathLike, fspath
from pathlib import Path

from armor_recipes.recipe.problems import Mark, Problems, show
from armor_recipes.recipe.tree import Entry, Items, Node, Scalar, Table
from armor_recipes.recipe.yaml_source import MAX_DEPTH, MAX_INT, UNENCODABLE

SOURCE = "the recipe mapping"


def read_mapping(mapping: Mapping[str, object], problems: Problems, *, source: str = SOURCE) -> Table:
    """Return the tree of `mapping`: text, numbers, paths, None, lists or tuples, and mappings with text keys.

    Relative data files and `extends` in it are relative to the working directory. Problems are said to be at `source`.
    """
    mark = Mark(source, None, Path())
    node = _build(mapping, (), mark, problems)
    if isinstance(node, Table):
        return node
    problems.add(mark, (), f"must be a mapping (value {show(mapping)})")
    return Table({}, mark)


def _build(value: object, path: tuple[str, ...], mark: Mark, problems: Problems) -> Node:
    if len(path) > MAX_DEPTH:
        return _bad(f"nested deeper than {MAX_DEPTH} levels", path, mark, problems)
    match value:
        case Mapping():
            return _table(value, path, mark, problems)
        case list() | tuple():
            children = (_build(child, (*path, str(i)), mark, problems) for i, child in enumerate(value))
            return Items(tuple(children), mark)
        case PathLike():
            return _build(fspath(value), path, mark, problems)
        case None | bool() | int() | float() | str() if usable(value):
            return Scalar(value, mark, text="" if value is None else str(value))
        case _:
            kind = type(value).__name__
            text = (
                f"no recipe can hold this {kind} (value {show(value)}); give text, a finite number, a list or a mapping"
            )
            return _bad(text, path, mark, problems)


def _table(value: Mapping[object, object], path: tuple[str, ...], mark: Mark, problems: Problems) -> Table:
    entries = {}
    for key, child in value.items():
        if isinstance(key, str) and usable(key):
            entries[key] = Entry(mark, _build(child, (*path, key), mark, problems))
        else:
            _bad(f"a key must be text (key {show(key)})", path, mark, problems)
    return Table(entries, mark)


def usable(value: object) -> bool:
    """Whether a recipe can hold a text or number: no NUL, finite, below 2^64."""
    match value:
        case str():
            return not UNENCODABLE.search(value)
        case float():
            return math.isfinite(value)
        case int():
            return abs(value) < MAX_INT
        case _:
            return True


def _bad(text: str, path: tuple[str, ...], mark: Mark, problems: Problems) -> Scalar:
    problems.add(mark, path, text)
    return Scalar(None, mark, bad=True)
