"""Modifiers that only llm-compressor has, as steps of a run: its own `oneshot` runs them on the dense model, before any of ours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from armor_recipes.recipe.llmcompressor import MODIFIERS, field_of
from armor_recipes.recipe.problems import Problems, nearest
from armor_recipes.recipe.recipe import StepEntry
from armor_recipes.recipe.stages import Placed
from armor_recipes.recipe.tree import Entry, Table, plain

_QUANTISES = "scheme"
_ONLINE = ("QuIPModifier",)
_RESHAPES = ("REAPPruningModifier",)
_LEFT: Mapping[str, str] = {
    **dict.fromkeys(_ONLINE, "adds rotations that are made as the model runs"),
    **dict.fromkeys(_RESHAPES, "takes experts away, which makes another model"),
}
"""What cannot be a step, and why: nothing of ours could go on from what it leaves."""


def first_steps(placed: Sequence[Placed], problems: Problems) -> tuple[StepEntry, ...]:
    """The steps of a recipe. Those that cannot run as one, or stand behind a modifier of ours, are noted as problems."""
    steps: list[StepEntry] = []
    ours = ""
    for one in placed:
        if not one.is_step:
            ours = ours or one.name
            continue
        table = Table({k: e for k, e in one.fields.entries.items() if not _asks_for_nothing(one.kind, k, e)}, one.mark)
        fields: Any = plain(table)
        steps.append(StepEntry(one.name, one.kind, one.stage, one.group, fields, str(one.mark)))
        text = _why_not(one, ours)
        if text:
            problems.add(one.mark, one.path, text)
        known = MODIFIERS[one.kind].fields
        for key in (key for key in table.entries if key not in known):
            text = f"llm-compressor's {one.kind} has no such field; {nearest(key, known, noun='field of it')}"
            problems.add(one.fields.entries[key].mark, (*one.path, key), text)
    return tuple(steps)


def _asks_for_nothing(kind: str, key: str, entry: Entry) -> bool:
    """Whether it is bookkeeping of llm-compressor's, or asks for nothing that is not done anyway."""
    known = None if key in MODIFIERS[kind].fields else field_of(kind, key)
    return known is not None and known.is_empty(entry.node)


def _why_not(one: Placed, ours: str) -> str:
    if ours:
        return (
            f"llm-compressor has {one.kind}, and runs it on a dense model alone, not after {ours}, whose weights it would not "
            f"leave as they are: put it before {ours}"
        )
    reason = _LEFT.get(one.kind)
    if reason is None and _QUANTISES in MODIFIERS[one.kind].fields:
        reason = "leaves a quantised model"
    if reason is None:
        return ""
    return (
        f"llm-compressor has {one.kind}, which {reason}, and no modifier here goes on from that: run it by itself with "
        "llm-compressor, or remove it"
    )
