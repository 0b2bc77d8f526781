"""A recipe as a tree that remembers where each key and value was written, and how two such trees merge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from armor_recipes.recipe.problems import Mark

Value: TypeAlias = bool | int | float | str | None


@dataclass(frozen=True, slots=True)
class Scalar:
    """A single value. `text` is how it was written (`on` for True); `bad` marks one already reported as a problem."""

    value: Value
    mark: Mark
    text: str = ""
    bad: bool = False


@dataclass(frozen=True, slots=True)
class Items:
    """A list."""

    nodes: tuple[Node, ...]
    mark: Mark


class Entry(NamedTuple):
    """A value with the place of its key."""

    mark: Mark
    node: Node


@dataclass(frozen=True, slots=True)
class Table:
    """A mapping, in the order of first appearance."""

    entries: Mapping[str, Entry]
    mark: Mark


Node: TypeAlias = Scalar | Items | Table


def is_null(node: Node) -> bool:
    """Tell whether `node` is null (written `null`, `~`, or nothing at all)."""
    return isinstance(node, Scalar) and node.value is None and not node.bad


def holds_bad(node: Node) -> bool:
    """Tell whether `node` is, or holds, a value that was already reported as a problem."""
    match node:
        case Scalar():
            return node.bad
        case Items():
            return any(holds_bad(child) for child in node.nodes)
        case Table():
            return any(holds_bad(entry.node) for entry in node.entries.values())


def plain(node: Node) -> object:
    """Return `node` as plain dicts, lists and values."""
    match node:
        case Scalar():
            return node.value
        case Items():
            return [plain(child) for child in node.nodes]
        case Table():
            return {key: plain(entry.node) for key, entry in node.entries.items()}


def merge(base: Node, top: Node) -> Node:
    """Return `base` overridden by `top`: two mappings merge key by key, anything else (a list too) is replaced.

    Keys keep the order of first appearance. A merged mapping keeps the place where it first appeared.
    """
    if not (isinstance(base, Table) and isinstance(top, Table)):
        return top
    entries = dict(base.entries)
    for key, entry in top.entries.items():
        entries[key] = merge_entry(entries.get(key), entry)
    return Table(entries, base.mark)


def merge_entry(base: Entry | None, top: Entry) -> Entry:
    """Return the entry that results when `top` is laid over `base`; see `merge`."""
    if base is None or not (isinstance(base.node, Table) and isinstance(top.node, Table)):
        return top
    return Entry(base.mark, merge(base.node, top.node))


def nest(keys: Iterable[str], node: Node, mark: Mark) -> Node:
    """Return `node` under a chain of one-key mappings, outermost key first, all marked `mark`."""
    for key in reversed(tuple(keys)):
        node = Table({key: Entry(mark, node)}, mark)
    return node


def without(table: Table, key: str) -> Table:
    """Return `table` without `key`."""
    return Table({name: entry for name, entry in table.entries.items() if name != key}, table.mark)
