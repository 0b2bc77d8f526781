"""What came of the experts of mixtures: how many calibration tokens reached them, and what was not done after all."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from armor_recipes.model.experts import expert_of
from armor_recipes.modifiers.kinds.changes import ModuleResult, StepResult
from armor_recipes.modifiers.kinds.experts import ExpertBelow
from armor_recipes.modifiers.kinds.module import ModulePlan
from armor_recipes.modifiers.kinds.rearranger import RearrangeResult
from armor_recipes.plan import Plan, Totals
from armor_recipes.recipe import Recipe


def expert_rows(
    recipe: Recipe, modules: Mapping[str, ModuleResult], results: Sequence[StepResult]
) -> list[dict[str, Any]]:
    """Calibration tokens that each expert itself has seen, one entry for each layer of experts and modifier; empty without experts.

    Of each layer: the fewest, the median and the most tokens of an expert, how many experts have a module below the recipe's
    minimum and what was done with them. Modifiers whose numbers are the same share an entry.
    """
    seen: dict[tuple[str, str], dict[int, int]] = {}
    calibrated = {entry.key for entry in recipe.modifiers if entry.config.calibration is not None}
    for modifier, name, tokens in _tokens(modules, results):
        expert = expert_of(name)
        if expert is not None and modifier in calibrated:
            counts = seen.setdefault((expert.layer, modifier), {})
            counts[expert.number] = min(tokens, counts.get(expert.number, tokens))
    poor: dict[tuple[str, str], set[int]] = {}
    for one in (result for result in results if isinstance(result, ExpertBelow)):
        expert = expert_of(one.name)
        if expert is not None:
            poor.setdefault((expert.layer, one.modifier), set()).add(expert.number)
    rows: dict[tuple[Any, ...], list[str]] = {}
    for (layer, modifier), counts in seen.items():
        numbers = *_numbers(list(counts.values())), len(poor.get((layer, modifier), ()))
        rows.setdefault((layer, *numbers), []).append(modifier)
    names = ("layer", "experts", "fewest", "median", "most", "below")
    moe = {"minimum_tokens": recipe.moe.minimum_tokens, "done": recipe.moe.below}
    return [{**dict(zip(names, row, strict=True)), **moe, "modifiers": keys} for row, keys in rows.items()]


def _numbers(tokens: Sequence[int]) -> tuple[float, ...]:
    return len(tokens), min(tokens), statistics.median(tokens), max(tokens)


def _tokens(modules: Mapping[str, ModuleResult], results: Sequence[StepResult]) -> Iterator[tuple[str, str, int]]:
    """Of each modifier and module that it was calibrated on, the tokens that the module saw."""
    for name, result in modules.items():
        yield result.modifier, name, result.tokens
        yield from ((change.modifier, name, change.tokens) for change in result.changes)
    for other in results:
        if isinstance(other, ExpertBelow) and other.done == "skip":
            yield other.modifier, other.name, other.tokens
        if isinstance(other, RearrangeResult):
            yield other.modifier, other.consumer, other.tokens


def totals_done(plan: Plan, modules: Mapping[str, ModuleResult], results: Sequence[StepResult]) -> Totals:
    """The plan's totals without what was left alone."""
    skipped = {(r.modifier, r.name) for r in results if isinstance(r, ExpertBelow) and r.done == "skip"}
    if not skipped:
        return plan.totals
    rows = (row for row in plan.modules if (row.modifier, row.name) not in skipped and row.name in modules)
    done: dict[str, ModulePlan] = {row.name: row for row in rows}
    before = sum(row.bytes_before for row in done.values())
    return Totals(
        modules=len(done),
        bytes_before=before,
        bytes_after=sum(row.bytes_after for row in done.values()),
        factor_bytes=sum(row.factor_bytes for row in done.values()),
        untouched_bytes=plan.totals.untouched_bytes + plan.totals.bytes_before - before,
    )
