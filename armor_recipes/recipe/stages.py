"""The stages of a recipe: `NAME_stage: {NAME_modifiers: {Kind: {fields}}}`, as in llm-compressor.

A group is a mapping from `Kind` or `Kind@name` to its fields (nothing at all means no fields), or, where one kind is
used twice, a list of one-key mappings: the first is called `Kind`, the second `Kind@2`, and so on. What llm-compressor
would drop in silence is an error here: misspelt stages and groups, `args`, groups outside a stage, keys of a stage that
are no group.
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from armor_recipes.recipe.llmcompressor import not_here
from armor_recipes.recipe.problems import Mark, Problems, nearest, shorten, show
from armor_recipes.recipe.schema import ModifierConfig, Sections
from armor_recipes.recipe.tree import Entry, Items, Node, Scalar, Table, holds_bad, is_null, plain

STAGE = "_stage"
GROUP = "_modifiers"
INSTANCE_NAME = re.compile(r"[A-Za-z0-9_-]+")
SECTIONS = tuple(Sections.model_fields)
DROPPED = {
    "args": "write the values into the modifiers, or override them with --set",
    "recipe_args": "write the values into the modifiers, or override them with --set",
    "enabled": "remove it, and the stage with it if it is not to run",
}
"""Keys that llm-compressor takes and drops, and what to do instead."""


class KnownModifiers(dict[str, type[ModifierConfig]]):
    """The config class of each registered modifier by name.

    `broken` tells of plug-ins whose modifiers are missing, and why; `steps` names those that llm-compressor's `oneshot` can run.
    """

    def __init__(
        self,
        known: Mapping[str, type[ModifierConfig]],
        *,
        broken: Sequence[str] = (),
        steps: Collection[str] = (),
    ) -> None:
        super().__init__(known)
        self.broken = tuple(broken)
        self.steps = frozenset(steps)


@dataclass(frozen=True, slots=True)
class Placed:
    """A modifier as it stands in the recipe, its fields not yet checked."""

    stage: str
    group: str
    name: str
    kind: str
    fields: Table
    mark: Mark
    is_step: bool = False

    @property
    def path(self) -> tuple[str, ...]:
        """Its keys in the recipe."""
        return (self.stage, self.group, self.name)


@dataclass(frozen=True, slots=True)
class Stages:
    """Walks the stages of a merged recipe and notes everything that is out of place."""

    registry: Mapping[str, type[ModifierConfig]]
    problems: Problems
    unknown: list[tuple[str, tuple[str, ...], Entry]] = field(default_factory=list)
    """Modifiers that are not registered, with their keys and fields."""

    def walk(self, recipe: Table) -> Iterator[Placed]:
        """Yield every modifier in recipe order; those of an unknown kind are noted and left out."""
        kinds = []
        for key, entry in recipe.entries.items():
            if key.endswith(STAGE):
                for placed in self._stage(key, entry):
                    kinds.append(placed.kind)
                    yield placed
            elif key not in SECTIONS:
                self.problems.add(entry.mark, (key,), self._unknown_section(key, entry.node, recipe))
        for kind, path, fields in self.unknown:
            self._note_unknown(kind, path, fields, kinds)

    def _stage(self, stage: str, entry: Entry) -> Iterator[Placed]:
        if not isinstance(entry.node, Table) or not entry.node.entries:
            self._expect(
                entry, (stage,), "must be a mapping of groups, such as `armor_modifiers:`; fill it or remove it"
            )
            return
        for key, group in entry.node.entries.items():
            if key.endswith(GROUP):
                yield from self._group(stage, key, group)
            else:
                self.problems.add(group.mark, (stage, key), _unknown_group(key))

    def _group(self, stage: str, group: str, entry: Entry) -> Iterator[Placed]:
        names: set[str] = set()
        for name, kind, fields in self._named(stage, group, entry):
            path = (stage, group, name)
            if name in names:
                self.problems.add(
                    fields.mark, path, "a second modifier of this name in the group; name them apart: `Kind@name`"
                )
            names.add(name)
            if not self._known_kind(name, kind, path, fields):
                continue
            table = Table({}, fields.mark) if is_null(fields.node) else fields.node
            if isinstance(table, Table):
                yield Placed(stage, group, name, kind, table, fields.mark, kind not in self.registry)
            else:
                self._expect(fields, path, "must be a mapping of the modifier's fields")

    def _named(self, stage: str, group: str, entry: Entry) -> Iterator[tuple[str, str, Entry]]:
        """Yield (name, kind, fields) of each modifier of a group, which is a mapping or a list of one-key mappings."""
        match entry.node:
            case Table(entries=entries) if entries:
                for name, fields in entries.items():
                    yield name, name.partition("@")[0], fields
            case Items(nodes=nodes) if nodes:
                yield from self._listed(stage, group, nodes)
            case _:
                text = (
                    "must be a mapping from modifiers to their fields, or a list of one-key mappings; fill or remove it"
                )
                self._expect(entry, (stage, group), text)

    def _listed(self, stage: str, group: str, nodes: tuple[Node, ...]) -> Iterator[tuple[str, str, Entry]]:
        for index, name, fields in listed_names(nodes):
            if fields is None:
                entry = Entry(nodes[index].mark, nodes[index])
                self._expect(entry, (stage, group, str(index)), "must be a mapping with one key, the modifier")
            else:
                yield name, name.partition("@")[0], fields

    def _known_kind(self, name: str, kind: str, path: tuple[str, ...], fields: Entry) -> bool:
        """Tell whether `kind` is registered; note what is wrong with it, or with the name behind its `@`."""
        mark = fields.mark
        _, at, instance = name.partition("@")
        if at and not INSTANCE_NAME.fullmatch(instance):
            text = f"the name after @ is {show(instance)}; it takes letters, digits, - and _"
            self.problems.add(mark, path, text)
        if kind not in self.registry and isinstance(self.registry, KnownModifiers) and kind in self.registry.steps:
            return True
        if kind not in self.registry:
            self.unknown.append((kind, path, fields))
        return kind in self.registry

    def _note_unknown(self, kind: str, path: tuple[str, ...], fields: Entry, kinds: Collection[str]) -> None:
        """Note a modifier that is not registered, in a recipe with these kinds of those that are."""
        broken = self.registry.broken if isinstance(self.registry, KnownModifiers) else ()
        known = nearest(kind, self.registry, noun="registered modifier")
        text = not_here(kind, self.registry, plain(fields.node), kinds) or f"unknown modifier {show(kind)}; {known}"
        self.problems.add(fields.mark, path, "; ".join([text, *broken]))

    def _expect(self, entry: Entry, path: tuple[str, ...], text: str) -> None:
        """Note that the value of `entry` has the wrong shape, unless it was reported already."""
        if not holds_bad(entry.node):
            self.problems.add(entry.mark, path, f"{text} (value {describe(entry.node)})")

    def _unknown_section(self, key: str, node: Node, recipe: Table) -> str:
        if key in DROPPED:
            return f"unknown key, which llm-compressor would drop in silence; {DROPPED[key]}"
        if key.endswith(GROUP) or key == GROUP.strip("_"):
            return f"a group of modifiers stands inside a stage: write `default_stage: {{{_as_group(key)}: …}}`"
        if isinstance(node, Table) and any(name.endswith(GROUP) for name in node.entries):
            return f"unknown key; nearest valid key: {_with_suffix(key, STAGE)} (the name of a stage ends in {STAGE})"
        places = [] if isinstance(node, Table) else list(_places(recipe, key))
        if places:
            return f"unknown key; it stands further in, as {' and '.join(places)}"
        return f"unknown key; {_nearest_or_rule(key, [*SECTIONS, 'extends', 'remove', 'vars'], STAGE)}"


def _places(table: Table, key: str, path: tuple[str, ...] = ()) -> Iterator[str]:
    """Every place below the top of a recipe where a mapping has that key, with dots between."""
    for name, entry in table.entries.items():
        if path and name == key:
            yield ".".join((*path, name))
        if isinstance(entry.node, Table):
            yield from _places(entry.node, key, (*path, name))


def listed_names(nodes: tuple[Node, ...]) -> Iterator[tuple[int, str, Entry | None]]:
    """Yield (index, name, fields) for each item of a group written as a list; fields None where it has not one key."""
    seen: Counter[str] = Counter()
    for index, node in enumerate(nodes):
        if not isinstance(node, Table) or len(node.entries) != 1:
            yield index, "", None
            continue
        ((key, fields),) = node.entries.items()
        seen[key] += 1
        numbered = key if seen[key] == 1 or "@" in key else f"{key}@{seen[key]}"
        yield index, numbered, fields


def describe(node: Node) -> str:
    """Return how a value is shown in a message: as it was written, cut to 80 characters."""
    if isinstance(node, Scalar) and not isinstance(node.value, str):
        return shorten(node.text) or ("null" if is_null(node) else show(node.value))
    return show(plain(node))


def _unknown_group(key: str) -> str:
    if key in DROPPED:
        return f"unknown key, which llm-compressor would drop in silence; {DROPPED[key]}"
    if key == GROUP.strip("_"):
        return f"unknown key; nearest valid key: {_as_group(key)} (the name of a group ends in {GROUP})"
    return f"unknown key; {_nearest_or_rule(key, [], GROUP)}"


def _nearest_or_rule(key: str, known: list[str], suffix: str) -> str:
    """Return the nearest of the `known` keys and of those ending in `suffix`; where none is near, what there may be."""
    own = [] if _misspelt_stem(key, suffix) is None else [_with_suffix(key, suffix)]
    text = nearest(key, [*known, *own], noun="valid key")
    return text if text.startswith("nearest") else f"valid keys: {', '.join([*known, f'NAME{suffix}'])}"


def _with_suffix(key: str, suffix: str) -> str:
    """Return `key` with its last part replaced by `suffix` if it is a misspelling of it, else with `suffix` added."""
    stem = _misspelt_stem(key, suffix)
    return (key[:80] if stem is None else stem) + suffix


def _misspelt_stem(key: str, suffix: str) -> str | None:
    """Return what stands before a misspelt `suffix` in `key`, None if nothing like it is there."""
    stem, underscore, last = key[:80].rpartition("_")
    return stem if underscore and difflib.get_close_matches(last, [suffix.strip("_")]) else None


def _as_group(key: str) -> str:
    return key if key.endswith(GROUP) else f"default{GROUP}"
