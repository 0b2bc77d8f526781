"""Make a plan: every target resolved, checked and costed on shapes alone, before any weight is read."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from armor_recipes.checkpoint.compressed import CompressedModel
from armor_recipes.errors import PlanError
from armor_recipes.model.blocks import Stacks, find_stacks
from armor_recipes.model.facts import ModelFacts, model_facts
from armor_recipes.model.linears import Linears, find_linears
from armor_recipes.modifiers import AnyModifier
from armor_recipes.modifiers.kinds.contract import Planned, Planning, Row, once
from armor_recipes.modifiers.kinds.module import ModulePlan
from armor_recipes.plan.experts import expert_notes, expert_problems, plan_experts
from armor_recipes.plan.given import given_notes, given_problems, given_rows
from armor_recipes.plan.order import order_problems, order_warnings
from armor_recipes.plan.plan import Plan, PlanWarning, Totals, last_of_each
from armor_recipes.plan.serving import PackedModule, serve_problems, straddling
from armor_recipes.plan.sharing import resolve_shared, stacks_with_shared_weights
from armor_recipes.plan.targets import Matched, Tree, not_linear, resolve_targets, vain_ignores
from armor_recipes.recipe import ModifierEntry, Recipe

#: The number of one of many in a module's name.
_NUMBER = re.compile(r"\.\d+(?=\.|$)")

Modifiers = Mapping[str, AnyModifier[Any]]


@dataclass(frozen=True, slots=True)
class _Subject:
    """A model as planning sees it: what is found in it once, for all entries."""

    model: nn.Module
    stacks: Stacks
    facts: ModelFacts
    linears: Linears
    tree: Tree

    @classmethod
    def of(cls, model: nn.Module) -> _Subject:
        modules = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if name]
        stacks = find_stacks(model)
        return cls(model, stacks, model_facts(model), find_linears(model), Tree(modules, stacks))


def make_plan(
    recipe: Recipe,
    model: nn.Module,
    modifiers: Modifiers,
    *,
    itemsize: int,
    compressed: CompressedModel | None = None,
) -> Plan:
    """Resolve, check and cost the recipe on a model (meta tensors will do). All problems are raised at once as PlanError.

    `modifiers` holds an instance for each entry's key; `itemsize` is the bytes of a stored weight value; `compressed` is what of
    the model is packed or quantised. The time is in proportion to the number of modules.
    """
    subject = _Subject.of(model)
    packed = recipe.output.format != "dense"
    given = given_rows(compressed, subject.linears, subject.stacks, itemsize=itemsize, packed=packed)
    found = _answers(subject, recipe, modifiers, given.rows, itemsize)
    rows = list(_rows_of(recipe.modifiers, found))
    skipped = [left for one in found.values() for left in one.planned.skipped]
    overridden = [one for answer in found.values() for one in answer.planned.overridden]
    problems = [
        f"{entry.where}: {entry.name}: {problem}"
        for entry in recipe.modifiers
        for problem in found[entry.key].planned.problems
    ]
    problems += order_problems(recipe, rows, modifiers) + _late_dense(recipe, modifiers)
    problems += _conflicts_of_kinds(recipe, rows, modifiers)
    problems += expert_problems(recipe, model, rows, modifiers)
    problems += _unservable(recipe, subject, rows)
    problems += given_problems(recipe, rows, modifiers, given)
    if problems:
        raise PlanError("\n".join(problems))
    experts = plan_experts(recipe, model, subject.facts, rows, modifiers)
    touched = {name for row in rows for name in row.takes}
    return Plan(
        model=recipe.model.id,
        layers=subject.stacks.names_to(max((row.layer for row in rows if row.layer is not None), default=-1)),
        rows=_in_order(recipe, rows),
        ignored=tuple(name for name in _ignored(found.values()) if name not in touched),
        totals=_totals((*_written(given.rows, packed=packed), *rows), model, itemsize),
        skipped=tuple(skipped),
        overridden=tuple(overridden),
        notes=(
            *recipe.notes,
            *given_notes(rows, given),
            *_straddling(subject, rows),
            *expert_notes(recipe, experts),
            *_by_passes(subject, rows, modifiers),
        ),
        experts=experts,
        warnings=_warnings(recipe, subject, rows, modifiers),
        given=given.rows,
    )


@dataclass(frozen=True, slots=True)
class _Answer:
    """What one entry will do, and the modules that its `ignore` holds back."""

    planned: Planned
    ignored: tuple[str, ...] = ()


def _ignored(answers: Iterable[_Answer]) -> dict[str, None]:
    """What is held back from entries that take modules, or would have."""
    return {
        name: None
        for one in answers
        if not one.planned.rows or any(row.takes for row in one.planned.rows)
        for name in one.ignored
    }


def _answers(
    subject: _Subject, recipe: Recipe, modifiers: Modifiers, given: Sequence[Row], itemsize: int
) -> dict[str, _Answer]:
    """The answer of each entry, in the recipe's order. Those that look ahead are asked last, and no other sees their rows."""
    found: dict[str, _Answer] = {}
    for entry in sorted(recipe.modifiers, key=lambda entry: modifiers[entry.key].needs.ahead):
        try:
            found[entry.key] = _answer(subject, recipe, entry, modifiers, given, found, itemsize)
        except PlanError as error:
            found[entry.key] = _Answer(Planned((), (str(error),)))
    return {entry.key: found[entry.key] for entry in recipe.modifiers}


def _answer(
    subject: _Subject,
    recipe: Recipe,
    entry: ModifierEntry,
    modifiers: Modifiers,
    given: Sequence[Row],
    found: Mapping[str, _Answer],
    itemsize: int,
) -> _Answer:
    place, modifier = recipe.modifiers.index(entry), modifiers[entry.key]
    before = [(other, modifiers[other.key]) for other in recipe.modifiers[:place]]
    _check_first(entry, modifier, before)
    matched = resolve_targets(subject.tree, entry.config)
    rows = (*given, *_rows_of(recipe.modifiers[:place], found))
    after = _rows_of(recipe.modifiers[place + 1 :], found) if modifier.needs.ahead else ()
    planned = _plan_entry(subject, recipe, entry, modifier, matched, rows, before, itemsize, after)
    return _Answer(planned, tuple(matched.ignored))


def _rows_of(entries: Sequence[ModifierEntry], found: Mapping[str, _Answer]) -> tuple[Row, ...]:
    """What these entries will do, without what a later one of them replaces."""
    answers = [found[entry.key].planned for entry in entries if entry.key in found]
    gone = {id(row) for one in answers for row in one.replaced}
    return tuple(row for one in answers for row in one.rows if id(row) not in gone)


def _plan_entry(
    subject: _Subject,
    recipe: Recipe,
    entry: ModifierEntry,
    modifier: AnyModifier[Any],
    matched: Matched,
    rows: Sequence[Row],
    before: Sequence[tuple[ModifierEntry, AnyModifier[Any]]],
    itemsize: int,
    after: Sequence[Row],
) -> Planned:
    """What an entry does to the modules that it matched, and which of them it cannot take."""
    shared = resolve_shared(matched.names, set(matched.ignored), subject.linears, subject.stacks)
    planning = Planning(
        recipe,
        entry,
        subject.model,
        subject.stacks,
        subject.facts,
        subject.linears,
        shared.names,
        shared.uses,
        tuple(rows),
        tuple(before),
        itemsize,
        tuple(after),
    )
    unfit = {name: not_linear(name, subject.model.get_submodule(name)) for name in matched.others}
    refused = unfit if modifier.kind.chooses else {**unfit, **shared.unfit}
    problems, skipped = planning.unfit(refused if modifier.takes_modules else {})
    try:
        found = modifier.kind.plan(planning, modifier)
    except PlanError as error:
        found = Planned((), (str(error),))
    skipped += found.skipped
    if skipped and not found.rows and not found.problems and not entry.config.optional:
        problems += (f"`unfit: skip` leaves out all that `targets` matches ({len(skipped)}): {skipped[0].reason}",)
    return replace(found, problems=problems + found.problems, skipped=skipped)


def _warnings(recipe: Recipe, subject: _Subject, rows: Sequence[Row], modifiers: Modifiers) -> tuple[PlanWarning, ...]:
    """What is asked for in vain, and what was measured to be poor."""
    vain = [
        PlanWarning(entry.key, text) for entry in recipe.modifiers for text in vain_ignores(subject.tree, entry.config)
    ]
    return (*vain, *order_warnings(recipe, rows, modifiers), *_narrow(recipe, rows, modifiers))


def _narrow(recipe: Recipe, rows: Sequence[Row], modifiers: Modifiers) -> Iterator[PlanWarning]:
    """What was measured to be poor on calibration of so few datasets."""
    taking = {row.modifier for row in rows}
    for entry in recipe.modifiers:
        spec = entry.config.calibration
        text = modifiers[entry.key].poor_on(len(spec.datasets)) if spec is not None and entry.key in taking else ""
        if text:
            yield PlanWarning(entry.key, text)


def _in_order(recipe: Recipe, rows: Sequence[Row]) -> tuple[Row, ...]:
    """By stage, block and the recipe's order; what is done to the whole model after its last block."""
    order = {entry.key: i for i, entry in enumerate(recipe.modifiers)}
    stages = {stage: i for i, stage in enumerate(recipe.stages)}
    last = max((row.layer for row in rows if row.layer is not None), default=-1) + 1
    places = [(stages[row.stage], last if row.layer is None else row.layer, order[row.modifier]) for row in rows]
    return tuple(row for _, row in sorted(zip(places, rows, strict=True), key=lambda pair: pair[0]))


def _check_first(
    entry: ModifierEntry, modifier: AnyModifier[Any], before: Sequence[tuple[ModifierEntry, AnyModifier[Any]]]
) -> None:
    """Raise PlanError where another modifier of the stage stands before one that comes first in each block."""
    if modifier.needs.when != "before":
        return
    for other, earlier in before:
        if other.stage == entry.stage and earlier.needs.when != "before":
            raise PlanError(
                f"it changes a layer before others observe or change anything in it, but {other.name} ({other.where}) stands "
                f"before it in {entry.stage}; move it to the front of its stage"
            )


def _conflicts_of_kinds(recipe: Recipe, rows: Sequence[Row], modifiers: Modifiers) -> list[str]:
    """What each kind finds wrong between its own rows."""
    where = {entry.key: entry.where for entry in recipe.modifiers}
    kinds = dict.fromkeys(modifiers[entry.key].kind for entry in recipe.modifiers)
    return [
        problem
        for kind in kinds
        for problem in kind.conflicts(where, [row for row in rows if modifiers[row.modifier].kind is kind])
    ]


def _late_dense(recipe: Recipe, modifiers: Modifiers) -> list[str]:
    """What needs inputs or outputs of the dense model after a stage that changed weights: they are not made for later stages.

    The dense weights are kept for whoever trains the whole model.
    """
    first = recipe.stages[0]
    late = [(entry, modifiers[entry.key].needs) for entry in recipe.modifiers if entry.stage != first]
    return [
        f"{entry.where}: {entry.name}: {needs.because} needs the original model, but stage {entry.stage} comes after {first}, "
        f"which has changed it; put the modifier into {first}"
        for entry, needs in late
        if needs.dense == "outputs" or "dense" in needs.streams
    ]


def _unservable(recipe: Recipe, subject: _Subject, rows: Sequence[Row]) -> list[str]:
    """What keeps a server from splitting packed modules as `serve` asks, as messages, one for blocks that are alike."""
    if recipe.serve is None or recipe.output.format == "dense":
        return []
    packed = _packed(recipe, rows)
    names = subject.stacks.names_to(len(subject.stacks.names))
    found: dict[tuple[str, str, str], list[str]] = {}
    for entry, name, problem in serve_problems(subject.linears, subject.facts, packed, recipe.serve.tensor_parallel):
        block = names[subject.stacks.block_of(name) or 0]
        inside = name.removeprefix(block)
        alike = _NUMBER.sub(".{}", inside)
        told = block if alike == inside else name  # one of many in a block, as experts are
        place = f"{entry.where}: {entry.name}", problem.replace(told, "{}"), alike
        found.setdefault(place, []).append(told)
    return [f"{place}: {once(text, told)}" for (place, text, _), told in found.items()]


def _packed(recipe: Recipe, rows: Sequence[Row]) -> dict[str, PackedModule]:
    """The modules that rows leave packed, by name."""
    entries = {entry.key: entry for entry in recipe.modifiers}
    return {
        row.name: PackedModule(entries[row.modifier], (row.d_out, row.d_in), row.spec, row.uses)
        for row in last_of_each(rows).values()
        if row.spec is not None
    }


def first_unservable(recipe: Recipe, model: nn.Module, plan: Plan, ways: int) -> str | None:
    """The first thing that keeps a server from splitting the plan's packed modules over so many processes; None without one."""
    subject = _Subject.of(model)
    found = serve_problems(subject.linears, subject.facts, _packed(recipe, plan.rows), (ways,))
    return next((problem for _, _, problem in found), None)


def _straddling(subject: _Subject, rows: Sequence[Row]) -> tuple[str, ...]:
    """A sentence on fused layers whose blocks lie in two of their parts, one for blocks that are alike."""
    names = subject.stacks.names_to(len(subject.stacks.names))
    sizes = {
        row.name: row.block_size
        for row in last_of_each(rows).values()
        if row.stored_as == "packed" and row.block_size is not None
    }
    found: dict[str, list[str]] = {}
    for name, sentence in straddling(subject.linears, subject.facts, sizes):
        block = names[subject.stacks.block_of(name) or 0]
        found.setdefault(sentence.replace(block, "{}"), []).append(block)
    return tuple(once(text, blocks) for text, blocks in found.items())


def _by_passes(subject: _Subject, rows: Sequence[Row], modifiers: Modifiers) -> tuple[str, ...]:
    """A sentence on each stack whose statistics will come from passes of the whole model, as far as shapes tell."""
    learning = (row for row in rows if modifiers[row.modifier].needs.streams)
    observed = dict.fromkeys(shape.name for row in learning for shape in row.observed)
    return tuple(
        f"blocks of {name} share weights: its statistics come from passes of the whole model, one for each block and batch"
        for name in stacks_with_shared_weights(observed, subject.linears, subject.stacks)
    )


def _written(given: Sequence[ModulePlan], *, packed: bool) -> Sequence[ModulePlan]:
    """Rows of a compressed model with the bytes that they take in the output."""
    return given if packed else [replace(row, bytes_after=row.bytes_before, factor_bytes=0) for row in given]


def _totals(rows: Sequence[Row], model: nn.Module, itemsize: int) -> Totals:
    last = last_of_each(rows).values()
    before = sum(row.bytes_before for row in last)
    return Totals(
        modules=len(last),
        bytes_before=before,
        bytes_after=sum(row.bytes_after for row in last),
        factor_bytes=sum(row.factor_bytes for row in last),
        untouched_bytes=sum(p.numel() for p in model.parameters()) * itemsize - before,
    )
