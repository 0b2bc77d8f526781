"""Several files, `extends` and `--set` become one tree.

Files are laid over each other in the order given, each over what it `extends`, then every `--set` in order. A mapping
merges key by key, anything else (a list too) replaces; keys, and so stages and modifiers, keep the order of first
appearance. `model: NAME` is read as `model: {id: NAME}` before anything merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path

from armor_recipes.recipe import yaml_source
from armor_recipes.recipe.problems import LONGEST_VALUE, Mark, Problems, nearest, shorten, show
from armor_recipes.recipe.tree import (
    Entry,
    Items,
    Node,
    Scalar,
    Table,
    is_null,
    merge,
    merge_entry,
    nest,
    plain,
    without,
)
from armor_recipes.recipe.variables import in_full

MAX_FILES = 64
MAX_EXTENDS = 16
MAX_SET_KEYS = 32
MAX_PATH = 400
EXTENDS = "extends"
REMOVE = "remove"
"""The key that takes keys out of the recipes that a file is laid over."""
SUFFIXES = (".yaml", ".yml", ".json")


def builtin_recipes(folder: Path | None) -> dict[str, Path]:
    """Return the built-in recipes, by name and in its order, of a folder of NAME.yaml files; none without a folder."""
    return {} if folder is None else dict(sorted((path.stem, path) for path in folder.glob("*.yaml")))


@dataclass(slots=True)
class Files:
    """Reads recipe files and what they extend.

    `opened` lists them, so that a fan of `extends` cannot run away; `failed` tells whether any of them could not be
    read, so that what it would have held is not reported as missing.
    """

    builtin_dir: Path | None
    problems: Problems
    opened: list[Path] = field(default_factory=list)
    failed: bool = False

    def compose(self, paths: Sequence[str | Path]) -> Table | None:
        """Return the files laid over each other in order; None if none of them could be read."""
        here = Path()
        tables = [self._load(str(path), folder=here, named_at=None, chain=()) for path in paths]
        return self._overlay([table for table in tables if table is not None])

    def extend(self, table: Table, *, key: str = EXTENDS, chain: tuple[Path, ...] = ()) -> Table:
        """Return `table` laid over the files that its key `key` names, relative to the file that names them."""
        entry = table.entries.get(key)
        own = normalise(without(table, key))
        if entry is None:
            return own
        bases = [
            self._load(name, folder=mark.folder, named_at=mark, chain=chain, key=key)
            for name, mark in self._names(entry.node, key)
        ]
        return self._overlay([*(base for base in bases if base is not None), own]) or own

    def _overlay(self, tables: Sequence[Table]) -> Table | None:
        """Return the tables merged in order, each after what it removes of those before it; None if there are none."""
        result: Node | None = None
        for table in tables:
            result = table if result is None else merge(*remove(result, table, self.problems))
        return result if isinstance(result, Table) else None

    def _names(self, node: Node, key: str) -> list[tuple[str, Mark]]:
        nodes = node.nodes if isinstance(node, Items) else (node,)
        names = [
            (child.value, child.mark) for child in nodes if isinstance(child, Scalar) and isinstance(child.value, str)
        ]
        if len(names) != len(nodes) or not names:
            self.failed = True
            self.problems.add(node.mark, (key,), "must be a recipe file or a list of recipe files")
        return names

    def _load(
        self, name: str, *, folder: Path, named_at: Mark | None, chain: tuple[Path, ...], key: str = EXTENDS
    ) -> Table | None:
        path = self._find(name, folder, named_at, key)
        table = None
        if path is not None and not self._runs_away(path, named_at, chain):
            self.opened.append(_real(path))
            table = yaml_source.read_file(path, self.problems)
        if path is None or table is None:
            self.failed = True
            return None
        return self.extend(table, chain=(*chain, _real(path)))

    def _runs_away(self, path: Path, named_at: Mark | None, chain: tuple[Path, ...]) -> bool:
        """Note a problem, and return True, where reading `path` would go in a circle, too deep, or on for too long."""
        mark = named_at or Mark(str(path), None, path.parent)
        if _real(path) in chain:
            circle = " → ".join(step.name for step in (*chain[chain.index(_real(path)) :], path))
            self.problems.add(
                mark, ("extends",), f"the recipes extend each other in a circle: {circle}; remove one `extends`"
            )
        elif len(chain) >= MAX_EXTENDS:
            self.problems.add(
                mark, ("extends",), f"more than {MAX_EXTENDS} recipes extend one another; flatten some of them"
            )
        elif len(self.opened) >= MAX_FILES:
            self.problems.add(
                mark, (), f"more than {MAX_FILES} recipe files are read for one recipe; merge some of them"
            )
        else:
            return False
        return True

    def _find(self, name: str, folder: Path, named_at: Mark | None, key: str) -> Path | None:
        """Return the file that `name` means: a path wins over a built-in recipe's name."""
        path = folder / _expanded(name)
        builtin = builtin_recipes(self.builtin_dir)
        if _is_file(path):
            return path
        if name in builtin:
            return builtin[name]
        if _stands(path):
            return path
        self._note_missing(name, path, named_at, key, list(builtin))
        return None

    def _note_missing(self, name: str, path: Path, named_at: Mark | None, key: str, builtin: list[str]) -> None:
        mark = named_at or Mark(str(path), None, path.parent)
        keys = () if named_at is None else (key,)
        text = "no such file" if named_at is None else f"no such file: {shorten(repr(str(path)), limit=MAX_PATH)}"
        stem = Path(name).stem if Path(name).suffix in SUFFIXES else name
        near = _near_files(path)
        if stem in builtin:
            text += f"; the built-in recipe of this name is called {stem!r}, without a suffix"
        elif near:
            close = [] if "/" in name else get_close_matches(stem[:LONGEST_VALUE], builtin)
            text += f"; nearest in its folder: {', '.join(near)}"
            text += f"; nearest built-in recipe: {', '.join(close)}" if close else ""
        elif "/" not in name:
            text += f", and no built-in recipe has this name; {nearest(stem, builtin, noun='built-in recipe')}"
        self.problems.add(mark, keys, f"{text}; check the path" if "/" in name else text)


def _near_files(path: Path) -> list[str]:
    """Names of files in the folder of `path` that are like its own, at most three, the nearest first."""
    try:
        names = sorted(each.name for each in path.parent.iterdir() if each.suffix in SUFFIXES and each.is_file())
    except (OSError, ValueError):
        return []
    return [shorten(name) for name in get_close_matches(path.name[:LONGEST_VALUE], names)]


def _expanded(name: str) -> str:
    """The name with its home folder written out, where it begins with `~` and that is known."""
    try:
        return str(Path(name).expanduser()) if name.startswith("~") else name
    except RuntimeError:
        return name


def normalise(table: Table) -> Table:
    """Return `table` with `model: NAME` written as `model: {id: NAME}`, and variables in full."""
    table = in_full(table)
    entry = table.entries.get("model")
    if entry is None or not isinstance(entry.node, Scalar) or is_null(entry.node):
        return table
    full = Entry(entry.mark, nest(("id",), entry.node, entry.node.mark))
    return Table({**table.entries, "model": full}, table.mark)


def apply_overrides(table: Table, overrides: Sequence[str], problems: Problems) -> Table:
    """Return `table` with every `a.b.c=value` set, in order; a value is one YAML value, and nothing at all is null."""
    for override in overrides:
        source = f"--set {shorten(override, limit=100)}"
        table = _set(table, override, Mark(source, None, Path()), problems)
    return table


def _set(table: Table, override: str, mark: Mark, problems: Problems) -> Table:
    keys, equals, text = override.partition("=")
    path = tuple(keys.strip().split("."))
    if not equals or not all(path):
        problems.add(mark, (), "write --set a.b.c=value, with the keys of the recipe before the equals sign")
        return table
    if path[0] == "extends" or len(path) > MAX_SET_KEYS:
        problems.add(
            mark,
            (),
            "`extends` cannot be set, nor more than 32 keys deep; name the files on the command line, in order",
        )
        return table
    if len(text) > yaml_source.MAX_BYTES:
        problems.add(mark, (), "the value is too large; put it into a recipe file")
        return table
    value = yaml_source.parse(text, mark, problems)
    if value is None or not passable(table, path, mark, problems):
        return table
    return set_value(table, path, value, mark)


def set_value(table: Table, path: Sequence[str], value: Node, mark: Mark) -> Table:
    """Return `table` with `value` laid over what stands at `path`."""
    layer = normalise(Table({path[0]: Entry(mark, nest(path[1:], value, mark))}, mark))
    entry = merge_entry(table.entries.get(path[0]), layer.entries[path[0]])
    return Table({**table.entries, path[0]: entry}, table.mark)


def passable(table: Table, path: tuple[str, ...], mark: Mark, problems: Problems) -> bool:
    """Tell whether every key but the last of `path` leads into a mapping, or to nothing yet; note a problem if not."""
    node: Node = table
    for depth, key in enumerate(path[:-1]):
        entry = node.entries.get(key) if isinstance(node, Table) else None
        if entry is None or is_null(entry.node):
            return True
        node = entry.node
        if not isinstance(node, Table):
            what = "a list" if isinstance(node, Items) else f"the value {show(node.value)}"
            here = f"{'.'.join(path[: depth + 1])} is {what} (at {node.mark})"
            problems.add(mark, path, f"cannot be set: {here} and has no keys; replace it as a whole")
            return False
    return True


def remove(base: Node, table: Table, problems: Problems) -> tuple[Node, Table]:
    """Return `base` without what the key `remove` of `table` names, and `table` without that key."""
    entry = table.entries.get(REMOVE)
    if entry is None:
        return base, table
    nodes = entry.node.nodes if isinstance(entry.node, Items) else (entry.node,)
    for node in nodes:
        path = str(node.value).split(".") if isinstance(node, Scalar) else []
        left = _removed(base, path)
        if left is None:
            value = show(plain(node))
            problems.add(
                node.mark,
                (REMOVE,),
                f"{value} is no key of the recipes before this one; write its keys with dots between",
            )
        base = base if left is None else left
    return base, without(table, REMOVE)


def _removed(node: Node, path: Sequence[str]) -> Table | None:
    """Return a mapping without the value at `path`; None where there is none."""
    if not path or not isinstance(node, Table) or path[0] not in node.entries:
        return None
    if len(path) == 1:
        return without(node, path[0])
    entry = node.entries[path[0]]
    left = _removed(entry.node, path[1:])
    return None if left is None else Table({**node.entries, path[0]: Entry(entry.mark, left)}, node.mark)


def _real(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):
        return path


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _stands(path: Path) -> bool:
    """Tell whether anything stands at `path`; what cannot be looked at does, and reading it says why it cannot."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return True
