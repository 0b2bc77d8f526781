"""Modifiers that only llm-compressor has, as steps of a run: its own `oneshot` runs them on the dense model, before any of ours.

Where nothing of ours could go on from what such a step leaves, or it stands behind modifiers that both have, `oneshot` runs the
whole recipe, and what it writes is the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from armor_recipes.recipe.llmcompressor import MODIFIERS, cannot_be_mixed, field_of, left_behind_by
from armor_recipes.recipe.problems import Problems, nearest
from armor_recipes.recipe.recipe import StepEntry
from armor_recipes.recipe.stages import Placed
from armor_recipes.recipe.tree import Entry, Table, plain


def taken_steps(placed: Sequence[Placed], problems: Problems) -> tuple[tuple[StepEntry, ...], tuple[Placed, ...]]:
    """The modifiers that llm-compressor runs, and those that are left to us. What can run in neither way is noted as a problem.

    Where nothing is left to us, llm-compressor runs the recipe from its first modifier to its last.
    """
    ours = tuple(one for one in placed if not one.is_step)
    steps = tuple(one for one in placed if one.is_step)
    if steps and _is_whole(placed):
        own = [one for one in ours if one.kind not in MODIFIERS]
        if not own:
            steps, ours = tuple(placed), ()
        for one in steps if own else ():
            _note_mixed(placed, one, problems)
    return tuple(_entry(one, problems) for one in steps), ours


def _is_whole(placed: Sequence[Placed]) -> bool:
    """Whether what llm-compressor does is not all done before any of ours, or leaves something that none of ours goes on from."""
    last = max(number for number, one in enumerate(placed) if one.is_step)
    behind = not all(one.is_step for one in placed[: last + 1])
    return behind or last + 1 == len(placed) or any(one.is_step and _leaves(one) for one in placed)


def _leaves(one: Placed) -> str:
    """Why nothing of ours goes on from what a step leaves; empty where it does."""
    return left_behind_by(one.kind, plain(one.fields))


def _note_mixed(placed: Sequence[Placed], one: Placed, problems: Problems) -> None:
    """Why a step cannot run in a recipe in which there are modifiers that llm-compressor does not have."""
    before = next((other for other in placed if other is one or other.kind not in MODIFIERS), one)
    reason = _leaves(one)
    if before is not one:
        text = (
            f"llm-compressor has {one.kind}, and runs it on a dense model alone, not after {before.name}, whose weights it would "
            f"not leave as they are: put it before {before.name}"
        )
    elif reason:
        text = cannot_be_mixed(one.kind, reason)
    else:
        return
    problems.add(one.mark, one.path, text)


def _entry(one: Placed, problems: Problems) -> StepEntry:
    """A step with its own fields; those that llm-compressor's modifier does not have are noted as problems."""
    table = Table({k: e for k, e in one.fields.entries.items() if not _asks_for_nothing(one.kind, k, e)}, one.mark)
    known = MODIFIERS[one.kind].fields
    for key, entry in _unknown(table, known):
        text = f"llm-compressor's {one.kind} has no such field; {nearest(key, known, noun='field')}"
        problems.add(entry.mark, (*one.path, key), text)
    fields: Any = plain(table)
    return StepEntry(one.name, one.kind, one.stage, one.group, fields, str(one.mark))


def _unknown(table: Table, known: Sequence[str]) -> Iterator[tuple[str, Entry]]:
    return ((key, entry) for key, entry in table.entries.items() if key not in known)


def _asks_for_nothing(kind: str, key: str, entry: Entry) -> bool:
    """Whether it is bookkeeping of llm-compressor's, or asks for nothing that is not done anyway."""
    known = None if key in MODIFIERS[kind].fields else field_of(kind, key)
    return known is not None and known.is_empty(entry.node)
