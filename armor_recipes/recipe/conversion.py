"""`armor convert`: a recipe of llm-compressor, in YAML, JSON, front matter or Python, as a recipe in our words."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from armor_recipes.recipe import llmcompressor, yaml_source
from armor_recipes.recipe.composition import REMOVE, Files
from armor_recipes.recipe.dialect import Dialect
from armor_recipes.recipe.loading import Registry, check
from armor_recipes.recipe.problems import Mark, Problems
from armor_recipes.recipe.python_recipe import read_python
from armor_recipes.recipe.stages import GROUP, STAGE
from armor_recipes.recipe.tree import Entry, Items, Node, Scalar, Table, plain, without
from armor_recipes.recipe.variables import substitute
from armor_recipes.recipe.yaml_source import Dumper

QUANTISER = "QuantizationModifier"


@dataclass(frozen=True, slots=True)
class Converted:
    """A recipe as YAML, and a sentence on each thing that was written in other words, left out, or not read."""

    yaml: str
    notes: tuple[str, ...]


def convert_recipe(path: Path, *, registry: Registry) -> Converted:
    """Return the recipe in a file in our words. A `.py` file is parsed and never run.

    Model, data and output may be missing. Raises RecipeError with all that has no counterpart here, and with what is wrong with the
    recipe otherwise, by the lines of the file.
    """
    problems = Problems()
    table, notes = _read(path, problems)
    if table is None:
        problems.raise_if_any()
    assert table is not None, "without a table a problem was noted"
    rewriting = Rewriting(registry)
    dialect = Dialect(registry, problems)
    table = dialect.read(rewriting.read(table))
    check(_completed(substitute(without(table, REMOVE), problems)), registry, problems)
    text = yaml.dump(plain(table), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
    return Converted(text, (*notes, *rewriting.notes, *dialect.notes))


def _read(path: Path, problems: Problems) -> tuple[Table | None, tuple[str, ...]]:
    if path.suffix.lower() != ".py":
        return Files(None, problems).compose([path]), ()
    text = yaml_source.read_text(path, problems)
    found = None if text is None else read_python(text, Mark(str(path), 1, path.parent), problems)
    return (None, ()) if found is None else (found.table, found.notes)


def _completed(table: Table) -> Table:
    """The recipe with what a run may be given beside it, so that all else can be checked."""
    here = table.mark
    text = Scalar("given later", here, text="given later")
    wanted = {"model": "id", "output": "path", "calibration": "dataset"}
    entries = dict(table.entries)
    for section, key in wanted.items():
        there = entries.get(section)
        if there is None:
            entries[section] = Entry(here, Table({key: Entry(here, text)}, here))
        elif isinstance(there.node, Table):
            entries[section] = Entry(there.mark, Table({key: Entry(here, text), **there.node.entries}, there.node.mark))
    return Table(entries, here)


@dataclass(slots=True)
class Rewriting:
    """Writes what has another name here by it. `notes` tell of each."""

    registry: Mapping[str, type]
    notes: list[str] = field(default_factory=list)

    def read(self, table: Table) -> Table:
        """The recipe with the names that its modifiers and fields have now."""
        return _mapped(table, lambda key: key.endswith(STAGE) or f"{STAGE}_" in key, self._stage)

    def _stage(self, node: Node) -> Node:
        return _mapped(node, lambda key: key.endswith(GROUP), self._group) if isinstance(node, Table) else node

    def _group(self, node: Node) -> Node:
        match node:
            case Table(entries=entries, mark=mark):
                return Table(self._modifiers(entries), mark)
            case Items(nodes=nodes, mark=mark):
                return Items(tuple(part for item in nodes for part in self._item(item)), mark)
            case _:
                return node

    def _item(self, node: Node) -> list[Node]:
        if not isinstance(node, Table) or len(node.entries) != 1:
            return [node]
        return [Table({name: entry}, node.mark) for name, entry in self._modifiers(node.entries).items()]

    def _modifiers(self, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for written, entry in entries.items():
            kind, at, instance = written.partition("@")
            now = llmcompressor.RENAMED.get(kind, kind)
            if now != kind:
                self.notes.append(f"{entry.mark}: {kind} is {now} now")
            name = f"{now}{at}{instance}"
            if not isinstance(entry.node, Table):
                found[name] = entry
                continue
            own, moved = self._split(now, entry.node)
            found[name] = Entry(entry.mark, own)
            if moved.entries:
                after = QUANTISER if QUANTISER not in (*found, *entries) else f"{QUANTISER}@{len(found) + 1}"
                found[after] = Entry(entry.mark, moved)
                self.notes.append(f"{entry.mark}: {', '.join(moved.entries)} of {kind} are fields of {after} now")
        return found

    def _split(self, kind: str, table: Table) -> tuple[Table, Table]:
        """A modifier's fields by their names here, and those that belong to a quantisation modifier after it."""
        known: Collection[str] = getattr(self.registry.get(kind), "model_fields", ())
        own: dict[str, Entry] = {}
        moved: dict[str, Entry] = {}
        quantises = kind == llmcompressor.AWQ and any(key in table.entries for key in llmcompressor.SCHEMES)
        for key, entry in table.entries.items():
            if quantises and key in llmcompressor.MOVED_FROM_AWQ:
                moved[key] = entry
                continue
            name = llmcompressor.name_here(kind, key, known)
            if name != key:
                self.notes.append(f"{entry.mark}: {key} of {kind} is {name} now")
            own[name] = entry
        return Table(own, table.mark), Table(moved, table.mark)


def _mapped(table: Table, chosen: Callable[[str], bool], change: Callable[[Node], Node]) -> Table:
    """The table with the values of chosen keys changed."""
    entries = {
        key: Entry(entry.mark, change(entry.node)) if chosen(key) else entry for key, entry in table.entries.items()
    }
    return Table(entries, table.mark)
