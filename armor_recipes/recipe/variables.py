"""Variables of a recipe: `vars: {block: 64}`, and `${block}` wherever a value stands.

A variable is its default, or a mapping of `default`, `type` and `description`; `--set vars.block=32` and files laid over it give
another value. `${block}` alone becomes the value as it is, a list too; inside a longer text its letters. `$${` stands for `${`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from armor_recipes.recipe.problems import Mark, Problems, nearest, show
from armor_recipes.recipe.tree import Entry, Items, Node, Scalar, Table, is_null, nest, plain, without

VARS = "vars"
TYPES: Mapping[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
_FIELDS = ("default", "type", "description")
_NAME = r"[A-Za-z_][A-Za-z0-9_]*"
_USE = re.compile(rf"(\$?)\$\{{({_NAME})\}}")


def in_full(table: Table) -> Table:
    """Return a recipe with `vars: {name: value}` written as `vars: {name: {default: value}}`."""
    entry = table.entries.get(VARS)
    if entry is None or not isinstance(entry.node, Table):
        return table
    full = {
        name: one if isinstance(one.node, Table) else Entry(one.mark, nest(("default",), one.node, one.mark))
        for name, one in entry.node.entries.items()
    }
    return Table({**table.entries, VARS: Entry(entry.mark, Table(full, entry.node.mark))}, table.mark)


def substitute(table: Table, problems: Problems) -> Table:
    """Return a recipe without `vars`, each use of one replaced by its value. What is wrong with them is noted."""
    entry = table.entries.get(VARS)
    rest = without(table, VARS)
    if entry is not None and not isinstance(entry.node, Table):
        problems.add(entry.mark, (VARS,), "must be a mapping of names to values, such as `vars: {block: 64}`")
        return rest
    declared = entry.node.entries if entry is not None and isinstance(entry.node, Table) else {}
    values = {name: value for name, one in declared.items() if (value := _value(name, one, problems)) is not None}
    uses = _Uses(values, frozenset(declared), problems)
    result = uses.fill(rest)
    for name in values.keys() - uses.seen:
        problems.add(
            declared[name].mark,
            (VARS, name),
            f"is used nowhere: write ${{{name}}} where its value is to stand, or remove it",
        )
    return result if isinstance(result, Table) else rest


def _value(name: str, entry: Entry, problems: Problems) -> Node | None:
    """Return the value of a variable, checked; None where a problem was noted."""
    path = (VARS, name)
    if not re.fullmatch(_NAME, name) or not isinstance(entry.node, Table):
        problems.add(entry.mark, path, "a variable's name takes letters, digits and _, and begins with no digit")
        return None
    fields = entry.node.entries
    for key in fields.keys() - set(_FIELDS):
        problems.add(fields[key].mark, (*path, key), f"unknown key; {nearest(key, _FIELDS, noun='valid key')}")
    kind = plain(fields["type"].node) if "type" in fields else None
    if kind is not None and kind not in TYPES:
        problems.add(fields["type"].mark, (*path, "type"), f"is {show(kind)}; types are {', '.join(TYPES)}")
        return None
    default = fields.get("default")
    if default is None or is_null(default.node):
        problems.add(entry.mark, path, f"has no value: give --set {VARS}.{name}=VALUE, or a default")
        return None
    if kind is not None and not _is(default.node, str(kind)):
        problems.add(default.mark, path, f"is {show(plain(default.node))}, and its type is {kind}")
        return None
    return default.node


def _is(node: Node, kind: str) -> bool:
    if not isinstance(node, Scalar):
        return False
    return isinstance(node.value, TYPES[kind]) and isinstance(node.value, bool) == (kind == "bool")


@dataclass(slots=True)
class _Uses:
    """Puts values in their places. `seen` are the variables that are used."""

    values: Mapping[str, Node]
    declared: frozenset[str]
    problems: Problems
    seen: set[str] = field(default_factory=set)

    def fill(self, node: Node, path: tuple[str, ...] = ()) -> Node:
        """The same with every variable replaced."""
        match node:
            case Table(entries=entries, mark=mark):
                return Table({k: Entry(e.mark, self.fill(e.node, (*path, k))) for k, e in entries.items()}, mark)
            case Items(nodes=nodes, mark=mark):
                return Items(tuple(self.fill(child, path) for child in nodes), mark)
            case Scalar(value=str(text)) if "${" in text:
                return self._text(node, text, path)
        return node

    def _text(self, node: Scalar, text: str, path: tuple[str, ...]) -> Node:
        alone = _USE.fullmatch(text)
        if alone is not None and not alone[1]:
            value = self._of(alone[2], node.mark, path)
            return node if value is None else _placed(value, node.mark)
        filled = _USE.sub(lambda found: self._letters(found, node.mark, path), text)
        return replace(node, value=filled, text=filled)

    def _letters(self, found: re.Match[str], mark: Mark, path: tuple[str, ...]) -> str:
        if found[1]:
            return found[0][1:]
        value = self._of(found[2], mark, path)
        if isinstance(value, Scalar):
            return value.text or str(value.value)
        if value is not None:
            self.problems.add(mark, path, f"${{{found[2]}}} is no single value, and stands inside a text")
        return ""

    def _of(self, name: str, mark: Mark, path: tuple[str, ...]) -> Node | None:
        self.seen.add(name)
        if name not in self.declared:
            text = f"${{{name}}} is no variable of this recipe; {nearest(name, sorted(self.declared), noun='variable')}"
            self.problems.add(mark, path, text)
        return self.values.get(name)


def _placed(node: Node, mark: Mark) -> Node:
    """The value as if it were written at its use, so that what is wrong with it there is told there."""
    match node:
        case Scalar():
            return replace(node, mark=mark)
        case Items(nodes=nodes):
            return Items(tuple(_placed(child, mark) for child in nodes), mark)
        case Table(entries=entries):
            return Table({key: Entry(mark, _placed(entry.node, mark)) for key, entry in entries.items()}, mark)
