"""A list of modifiers in a Python file becomes the tree that a YAML file becomes. The file is parsed and never run.

Read are literals (also added and formatted ones), names that the file assigns them to, and calls by name: modifiers, `dict`,
`QuantizationScheme`, `QuantizationArgs`, `AWQMapping`, and words of enumerations such as `QuantizationStrategy.GROUP`. Anything
else is a problem with its line.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from armor_recipes.recipe import yaml_source
from armor_recipes.recipe.problems import Mark, Problems, shorten
from armor_recipes.recipe.python_source import usable
from armor_recipes.recipe.tree import Entry, Items, Node, Scalar, Table, merge_entry, nest

_ARGUMENTS: Final = {
    "dict": (),
    "QuantizationScheme": (),
    "QuantizationArgs": (),
    "AWQMapping": ("smooth_layer", "balance_layers", "activation_hook_target"),
}
"""Calls that are mappings, with the names of their arguments without a name."""
_ENUMERATIONS: Final = (
    "QuantizationType",
    "QuantizationStrategy",
    "ActivationOrdering",
    "DynamicType",
    "QuantizationFormat",
)
_CHANGES: Final = ("append", "extend", "insert", "remove", "pop")
_SAMPLES: Final = "num_calibration_samples"
_KEYS: Final = {
    "dataset": ("calibration", "dataset"),
    _SAMPLES: ("calibration", "samples", "at_most"),
    "max_seq_length": ("calibration", "sequence_length"),
    "batch_size": ("calibration", "batch_size"),
    "output_dir": ("output", "path"),
}
"""Where arguments of `oneshot` stand in a recipe. It takes as many samples as there are where there are fewer."""


class _NotLiteralError(Exception):
    """What cannot be read without running the file, at a node."""

    def __init__(self, node: ast.AST, text: str) -> None:
        super().__init__(text)
        self.node = node


@dataclass(frozen=True, slots=True)
class PythonRecipe:
    """The recipe's tree, and a sentence on each argument of `oneshot` that could not be read."""

    table: Table
    notes: tuple[str, ...]


def read_python(text: str, start: Mark, problems: Problems) -> PythonRecipe | None:
    """Return the recipe in a Python file, or None after noting why there is none. `start` is the place of its first line."""
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        mark = Mark(start.source, error.lineno, start.folder)
        problems.add(mark, (), f"not valid Python: {error.msg}")
        return None
    except (ValueError, RecursionError, MemoryError) as error:
        problems.add(start, (), f"not valid Python: {str(error) or type(error).__name__}")
        return None
    reader = _Reader(tree, start, problems)
    try:
        return reader.recipe()
    except _NotLiteralError as error:
        problems.add(reader.mark(error.node), (), f"{error}; the file is not run: write it as a literal, or write YAML")
    except RecursionError:
        problems.add(start, (), "names are assigned to each other in a circle, or values are nested too deep")
    return None


class _Reader:
    """Looks through one file. Names mean what was last assigned to them above."""

    def __init__(self, tree: ast.Module, start: Mark, problems: Problems) -> None:
        self.tree = tree
        self.start = start
        self.problems = problems
        self.built = 0
        self.assigned: dict[str, list[tuple[int, ast.expr]]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    if isinstance(target, ast.Name):
                        self.assigned.setdefault(target.id, []).append((node.lineno, node.value))

    def mark(self, node: ast.AST) -> Mark:
        """The place of a node."""
        return Mark(self.start.source, getattr(node, "lineno", None), self.start.folder)

    def recipe(self) -> PythonRecipe | None:
        """The only recipe of the file, with what its call of `oneshot` says."""
        calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call) and _called(node) == "oneshot"]
        given = [keyword.value for call in calls for keyword in call.keywords if keyword.arg == "recipe"]
        found = given or [value for _, value in self.assigned.get("recipe", ())] or self._alone()
        found = list({id(value): value for value in map(self._resolved, found)}.values())
        if len(found) != 1:
            lines = ", ".join(str(value.lineno) for value in found)
            what = f"{len(found)} recipes (lines {lines}); keep one of them" if found else "no `recipe = [...]`"
            self.problems.add(self.start, (), f"the file has {what}")
            return None
        self._check_unchanged()
        sections, notes = self._sections(calls)
        table = self._stages(found[0])
        return None if table is None else PythonRecipe(Table({**sections, **table.entries}, table.mark), tuple(notes))

    def _alone(self) -> list[ast.expr]:
        """The value of a snippet that is one expression."""
        return [node.value for node in self.tree.body if isinstance(node, ast.Expr)] if len(self.tree.body) == 1 else []

    def _resolved(self, node: ast.expr) -> ast.expr:
        """What a name stands for, whatever it is; other expressions as they are."""
        for _ in range(len(self.assigned) + 1):
            if not isinstance(node, ast.Name):
                break
            node = self._value(node)
        return node

    def _value(self, name: ast.Name) -> ast.expr:
        above = [value for line, value in self.assigned.get(name.id, ()) if line < name.lineno]
        if not above:
            raise _NotLiteralError(name, f"{name.id} is not assigned a value above")
        return above[-1]

    def _check_unchanged(self) -> None:
        """Raise _NotLiteralError where the recipe is changed after it was made."""
        for node in ast.walk(self.tree):
            target: ast.expr | None = node.target if isinstance(node, ast.AugAssign) else None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _CHANGES:
                target = node.func.value
            if isinstance(target, ast.Name) and target.id == "recipe":
                raise _NotLiteralError(node, "the recipe is changed here after it was made")

    def _sections(self, calls: Sequence[ast.Call]) -> tuple[dict[str, Entry], list[str]]:
        """Model, calibration and output from the call of `oneshot`, and what of them could not be read."""
        entries: dict[str, Entry] = {}
        notes = []
        for keyword in (keyword for call in calls[-1:] for keyword in call.keywords):
            path = ("model", "id") if keyword.arg == "model" else _KEYS.get(keyword.arg or "")
            if path is None:
                continue
            try:
                value = self._model(keyword.value) if path[0] == "model" else self.build(keyword.value)
                if not isinstance(value, Scalar):
                    raise _NotLiteralError(keyword.value, "no single value")
            except _NotLiteralError as error:
                keys = ".".join(path)
                notes.append(f"{self.mark(keyword)}: {keyword.arg} is not read ({error}): give --set {keys}=VALUE")
                continue
            mark = self.mark(keyword)
            layer = Entry(mark, nest(path[1:], value, mark))
            entries[path[0]] = merge_entry(entries.get(path[0]), layer)
        counted = any(keyword.arg == _SAMPLES for call in calls[-1:] for keyword in call.keywords)
        if "calibration" in entries and not counted:
            entries["calibration"] = merge_entry(entries["calibration"], self._default(calls[-1]))
        return entries, notes

    def _default(self, call: ast.Call) -> Entry:
        """How many samples `oneshot` takes where it is not told."""
        mark = self.mark(call)
        return Entry(mark, nest(_KEYS[_SAMPLES][1:], Scalar(512, mark, text="512"), mark))

    def _model(self, node: ast.expr) -> Node:
        """The name of a model, or of what `from_pretrained` loads."""
        node = self._resolved(node)
        if isinstance(node, ast.Call) and _called(node) == "from_pretrained" and node.args:
            return self.build(node.args[0])
        return self.build(node)

    def _stages(self, node: ast.expr) -> Table | None:
        """The recipe's stages: of a list of modifiers one, of YAML in a text its own."""
        if isinstance(node, ast.Dict):
            table = self.build(node)
            return table if isinstance(table, Table) else None
        if isinstance(node, ast.Constant | ast.JoinedStr):
            return self._yaml(node)
        entries: dict[str, Entry] = {}
        for call in self._modifiers(node):
            kind = _called(call)
            count = sum(name.partition("@")[0] == kind for name in entries)
            name = f"{kind}@{count + 1}" if count else kind
            entries[name] = Entry(self.mark(call), self._arguments(call, ()))
        mark = self.mark(node)
        stages = nest(("default_stage", "default_modifiers"), Table(entries, mark), mark)
        return stages if isinstance(stages, Table) else None

    def _yaml(self, node: ast.expr) -> Table | None:
        value = self.build(node)
        text = value.value if isinstance(value, Scalar) else None
        if not isinstance(text, str) or ":" not in text:
            raise _NotLiteralError(
                node, "the recipe is neither a list of modifiers nor YAML in a text (a path: convert that file)"
            )
        start = self.mark(node)
        return yaml_source.only_mapping(yaml_source.parse(text, start, self.problems), self.problems)

    def _modifiers(self, node: ast.expr) -> Iterator[ast.Call]:
        """The calls of a list, of lists in it and of lists that are added."""
        node = self._resolved(node)
        match node:
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                for element in elements:
                    yield from self._modifiers(element)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                yield from self._modifiers(left)
                yield from self._modifiers(right)
            case ast.Call() if _called(node).endswith("Modifier"):
                yield node
            case _:
                raise _NotLiteralError(node, f"{_shown(node)} is no modifier")

    def _arguments(self, call: ast.Call, names: Sequence[str]) -> Table:
        """A call's arguments as a mapping; `names` are those of its first ones, which may come without."""
        if len(call.args) > len(names):
            raise _NotLiteralError(call, f"{_called(call)} has an argument without a name")
        entries = {
            name: Entry(self.mark(value), self.build(value)) for name, value in zip(names, call.args, strict=False)
        }
        for keyword in call.keywords:
            value = self.build(keyword.value)
            if keyword.arg is not None:
                entries[keyword.arg] = Entry(self.mark(keyword.value), value)
            elif isinstance(value, Table):
                entries |= value.entries
            else:
                raise _NotLiteralError(keyword.value, "** takes a mapping")
        return Table(entries, self.mark(call))

    def build(self, node: ast.expr) -> Node:
        """The tree of a literal value. Raises _NotLiteralError."""
        mark = self.mark(node)
        self.built += 1
        if self.built > yaml_source.MAX_NODES:
            raise _NotLiteralError(node, f"names expand to more than {yaml_source.MAX_NODES:,} values")
        match node:
            case ast.List(elts=elements) | ast.Tuple(elts=elements):
                return Items(tuple(self.build(element) for element in elements), mark)
            case ast.Dict():
                return self._dict(node)
            case ast.Name():
                return self.build(self._value(node))
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return self._sum(node, self.build(left), self.build(right))
            case ast.JoinedStr(values=values):
                return Scalar("".join(str(self._text(value)) for value in values), mark)
            case ast.Call() if _called(node) in _ARGUMENTS:
                return self._arguments(node, _ARGUMENTS[_called(node)])
            case _:
                return _scalar(node, mark)

    def _dict(self, node: ast.Dict) -> Table:
        entries: dict[str, Entry] = {}
        for key, value in zip(node.keys, node.values, strict=True):
            built = self.build(value)
            name = self.build(key) if key is not None else None
            if isinstance(name, Scalar) and isinstance(name.value, str):
                entries[name.value] = Entry(self.mark(value), built)
            elif name is None and isinstance(built, Table):
                entries |= built.entries
            else:
                raise _NotLiteralError(value, "a key must be text")
        return Table(entries, self.mark(node))

    def _sum(self, node: ast.expr, left: Node, right: Node) -> Node:
        match left, right:
            case Items(nodes=first), Items(nodes=then):
                return Items((*first, *then), self.mark(node))
            case Scalar(value=str() as text), Scalar(value=str() as more):
                return Scalar(text + more, self.mark(node))
            case _:
                raise _NotLiteralError(node, f"{_shown(node)} is no literal")

    def _text(self, node: ast.expr) -> object:
        """The text of a part of a formatted string."""
        plain = isinstance(node, ast.FormattedValue) and node.conversion == -1 and node.format_spec is None
        value = self.build(node.value if plain and isinstance(node, ast.FormattedValue) else node)
        if not isinstance(value, Scalar):
            raise _NotLiteralError(node, f"{_shown(node)} is no single value")
        return value.value


def _scalar(node: ast.expr, mark: Mark) -> Scalar:
    """A single value, or a word of an enumeration. Raises _NotLiteralError."""
    match node:
        case ast.Constant(value=None | bool() | int() | float() | str() as value) if usable(value):
            return Scalar(value, mark, text="" if value is None else str(value))
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)) if usable(value):
            return Scalar(-value, mark, text=str(-value))
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            return Scalar(f"torch.{name}", mark)
        case ast.Attribute(value=ast.Name(id=kind) | ast.Attribute(attr=kind), attr=name) if kind in _ENUMERATIONS:
            return Scalar(name.lower(), mark)
        case _:
            raise _NotLiteralError(node, f"{_shown(node)} is no literal")


def _called(call: ast.Call) -> str:
    """The last part of the name that is called; empty for what has none."""
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case _:
            return ""


def _shown(node: ast.AST) -> str:
    return f"`{shorten(' '.join(ast.unparse(node).split()))}`"
