"""A recipe in llm-compressor's words becomes one in ours: what its files hold besides what is to be done is left out and told.

Left out: fields by which it keeps account of a run (`requires_calibration_data`, `index`, `group`, …), fields that ask for
nothing that is not done anyway (`sequential_update`, `offload_hessians: false`), `run_type: oneshot`, empty `args`. Stages that
it numbers when it writes a second recipe beside a checkpoint (`default_stage_0`) are stages. Everything else that it has and we
have not is an error that says what to write.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from armor_recipes.recipe import llmcompressor
from armor_recipes.recipe.problems import Problems
from armor_recipes.recipe.schema import ModifierConfig
from armor_recipes.recipe.stages import GROUP, STAGE
from armor_recipes.recipe.tree import Entry, Items, Node, Scalar, Table, holds_bad, is_null

_NUMBERED_STAGE = re.compile(rf"(.+){STAGE}_(\d+)")
Entries = dict[str, Entry]


@dataclass(slots=True)
class Dialect:
    """Reads a merged recipe. `left_out` counts the keys that were left out."""

    registry: Mapping[str, type[ModifierConfig]]
    problems: Problems
    left_out: Counter[str] = field(default_factory=Counter)

    def read(self, recipe: Table) -> Table:
        """The recipe in our words."""
        entries: Entries = {}
        for key, entry in recipe.entries.items():
            if key == "args" and _is_empty(entry.node):
                self.left_out[key] += 1
                continue
            name = _NUMBERED_STAGE.sub(rf"\1_\2{STAGE}", key)
            if name in recipe.entries and name != key:
                self.problems.add(entry.mark, (key,), f"it means {name}, which is there already; rename one of them")
            entries[name] = Entry(entry.mark, self._stage(name, entry.node)) if name.endswith(STAGE) else entry
        return Table(entries, recipe.mark)

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence on what was left out; none where nothing was."""
        if not self.left_out:
            return ()
        listed = ", ".join(f"{key} ({count})" if count > 1 else key for key, count in sorted(self.left_out.items()))
        return (
            f"left out of the recipe, where llm-compressor keeps account of it and nothing depends on it: {listed}",
        )

    def _stage(self, stage: str, node: Node) -> Node:
        if not isinstance(node, Table):
            return node
        entries: Entries = {}
        for key, entry in node.entries.items():
            if key == "run_type" and self._is_oneshot(stage, entry):
                continue
            entries[key] = Entry(entry.mark, self._group((stage, key), entry.node)) if key.endswith(GROUP) else entry
        return Table(entries, node.mark)

    def _is_oneshot(self, stage: str, entry: Entry) -> bool:
        """Whether a stage's `run_type` is that of every stage here; any other is a problem."""
        value = entry.node.value if isinstance(entry.node, Scalar) else ""
        if value is None or value == "oneshot":
            self.left_out["run_type"] += 1
        else:
            text = "llm-compressor trains in such a stage, and nothing here does: remove it, or the stage"
            self.problems.add(entry.mark, (stage, "run_type"), text)
        return True

    def _group(self, path: tuple[str, ...], node: Node) -> Node:
        match node:
            case Table(entries=entries, mark=mark):
                return Table(self._modifiers(path, entries), mark)
            case Items(nodes=nodes, mark=mark):
                return Items(tuple(part for item in nodes for part in self._listed(path, item)), mark)
            case _:
                return node

    def _listed(self, path: tuple[str, ...], node: Node) -> list[Node]:
        """An item of a group that is a list, as one or more such items."""
        if not isinstance(node, Table) or len(node.entries) != 1:
            return [node]
        return [Table({key: entry}, node.mark) for key, entry in self._modifiers(path, node.entries).items()]

    def _modifiers(self, path: tuple[str, ...], entries: Mapping[str, Entry]) -> Entries:
        return {
            name: Entry(entry.mark, self._fields((*path, name), entry.node)) if isinstance(entry.node, Table) else entry
            for name, entry in entries.items()
        }

    def _fields(self, path: tuple[str, ...], table: Table) -> Table:
        """The fields of a modifier without those that ask for nothing; of one that is not here, as they are."""
        kind = path[-1].partition("@")[0]
        config = self.registry.get(kind)
        if config is None:
            return table
        entries: Entries = {}
        for key, entry in table.entries.items():
            known = None if key in config.model_fields else llmcompressor.field_of(kind, key)
            if known is None or holds_bad(entry.node):
                entries[key] = entry
            elif known.is_empty(entry.node):
                self.left_out[key] += 1
            else:
                text = f"{kind} here has no such field; {known.says(entry.node, tuple(config.model_fields))}"
                self.problems.add(entry.mark, (*path, key), text)
        return Table(entries, table.mark)


def _is_empty(node: Node) -> bool:
    return is_null(node) or (isinstance(node, Table) and not node.entries)
