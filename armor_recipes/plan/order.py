"""Which modifiers may follow which: refused with the reason and an order that works, warned of where it was measured to be poor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from armor_recipes.modifiers import AnyModifier
from armor_recipes.modifiers.kinds.contract import Row, entry_name, once
from armor_recipes.plan.plan import PlanWarning
from armor_recipes.recipe import ModifierEntry, Recipe

Modifiers = Mapping[str, AnyModifier[Any]]


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two entries that have modules in common, in the order of the recipe."""

    first: ModifierEntry
    then: ModifierEntry
    names: tuple[str, ...]


def order_problems(recipe: Recipe, rows: Sequence[Row], modifiers: Modifiers) -> list[str]:
    """Two modifiers of one category on a module, one that cannot follow another, and one without what must come after or before."""
    touched = _touched(rows)
    pairs = list(_pairs(recipe, touched))
    there = [entry for entry in recipe.modifiers if entry.key in touched]
    missing = [text for entry in there for text in _missing(entry, pairs, modifiers)]
    return _taken_twice(recipe, rows, modifiers) + _wrong_order(recipe, pairs, modifiers) + missing


def order_warnings(recipe: Recipe, rows: Sequence[Row], modifiers: Modifiers) -> list[PlanWarning]:
    """What is legal, and was measured to be poor: a sentence with the figure for each two entries."""
    found = [(pair, _poor(pair, rows, modifiers)) for pair in _pairs(recipe, _touched(rows))]
    return [
        PlanWarning(pair.then.key, f"after {pair.first.name} on {once('{}', pair.names)}: {figure}")
        for pair, figure in found
        if figure
    ]


def _poor(pair: _Pair, rows: Sequence[Row], modifiers: Modifiers) -> str:
    names = set(pair.names)
    own = [row for row in rows if row.modifier == pair.then.key and names.intersection(row.touches)]
    return modifiers[pair.then.key].poor_after(modifiers[pair.first.key], own)


def _touched(rows: Sequence[Row]) -> dict[str, dict[str, None]]:
    """The modules that each entry changes, by its key, in order."""
    found: dict[str, dict[str, None]] = {}
    for row in rows:
        found.setdefault(row.modifier, {}).update(dict.fromkeys(row.touches))
    return found


def _pairs(recipe: Recipe, touched: Mapping[str, Mapping[str, None]]) -> Iterator[_Pair]:
    for first, then in combinations(recipe.modifiers, 2):
        names = tuple(name for name in touched.get(then.key, ()) if name in touched.get(first.key, ()))
        if names:
            yield _Pair(first, then, names)


def _forbids(then: AnyModifier[Any], first: AnyModifier[Any]) -> str:
    """Why one modifier cannot follow another on a module; empty where it can."""
    return next((then.cannot_follow[word] for word in first.words if word in then.cannot_follow), "")


def _taken_twice(recipe: Recipe, rows: Sequence[Row], modifiers: Modifiers) -> list[str]:
    """Modules that two modifiers of one category take, as messages."""
    where = {entry.key: entry.where for entry in recipe.modifiers}
    seen: dict[tuple[str, str], str] = {}
    problems = []
    for row, name in [(taker, name) for taker in rows for name in taker.takes]:
        category = modifiers[row.modifier].category
        earlier = seen.setdefault((name, category), row.modifier)
        if earlier != row.modifier:
            problems.append(
                f"{where[row.modifier]}: {entry_name(row.modifier)}: {name} is already taken by "
                f"{entry_name(earlier)} ({where[earlier]}), and both {category}; narrow the targets of one of them"
            )
    return problems


def _wrong_order(recipe: Recipe, pairs: Sequence[_Pair], modifiers: Modifiers) -> list[str]:
    """Pairs in which the later modifier cannot follow the earlier one, as messages with an order that works."""
    found = [(pair, _forbids(modifiers[pair.then.key], modifiers[pair.first.key])) for pair in pairs]
    advice = _advice(recipe, pairs, modifiers)
    return [
        f"{pair.then.where}: {pair.then.name}: cannot follow {pair.first.name} on {once('{}', pair.names)}: {reason}; {advice}"
        for pair, reason in found
        if reason
    ]


def _advice(recipe: Recipe, pairs: Sequence[_Pair], modifiers: Modifiers) -> str:
    order = _working_order(recipe, pairs, modifiers)
    if order is None:
        return "no order of them works: remove one, or narrow its targets so that no module has both"
    return f"an order that works: {', '.join(entry.name for entry in order)}"


def _working_order(recipe: Recipe, pairs: Sequence[_Pair], modifiers: Modifiers) -> list[ModifierEntry] | None:
    """The entries in an order that no rule forbids, as near to the recipe's as that goes; None where there is none."""
    after: dict[str, set[str]] = {entry.key: set() for entry in recipe.modifiers}
    for pair in pairs:
        for one, other in ((pair.first.key, pair.then.key), (pair.then.key, pair.first.key)):
            if _forbids(modifiers[other], modifiers[one]):
                after[one].add(other)  # the other must be done by then
    order: list[ModifierEntry] = []
    left = list(recipe.modifiers)
    while left:
        waiting = {entry.key for entry in left}
        free = next((entry for entry in left if not after[entry.key] & waiting), None)
        if free is None:
            return None
        order.append(free)
        left.remove(free)
    return order


def _missing(entry: ModifierEntry, pairs: Sequence[_Pair], modifiers: Modifiers) -> Iterator[str]:
    """What must come after or before an entry on a module of its own, and does not."""
    modifier = modifiers[entry.key]
    later = {word for pair in pairs if pair.first is entry for word in modifiers[pair.then.key].words}
    earlier = {word for pair in pairs if pair.then is entry for word in modifiers[pair.first.key].words}
    for word, reason in modifier.needs_after.items():
        if word not in later:
            yield f"{entry.where}: {entry.name}: {reason}; put one that takes its modules after it"
    for word, reason in modifier.needs_before.items():
        if word not in earlier:
            yield f"{entry.where}: {entry.name}: {reason}; put one that takes its modules before it"
