"""Plans and results as tables for people and as data for programs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from armor_recipes.cli.names import common_parent, grouped, short
from armor_recipes.modifiers.kinds.changes import ModuleResult, StepResult
from armor_recipes.modifiers.kinds.contract import Skipped, entry_name
from armor_recipes.modifiers.kinds.experts import ExpertBelow
from armor_recipes.modifiers.kinds.module import GIVEN, ModulePlan
from armor_recipes.modifiers.kinds.refiner import UnitLeftOut
from armor_recipes.plan import Plan, RunEstimate
from armor_recipes.plan.experts import ExpertsPlan
from armor_recipes.recipe import Recipe
from armor_recipes.report.evaluation import evaluation_json, evaluation_rows
from armor_recipes.report.experts import totals_done
from armor_recipes.report.manifest import sections
from armor_recipes.run import Result

#: Sizes of single modules that a resolved recipe shows.
_MOST_SIZES = 20
#: Lists of blocks that a plan's title names.
_MOST_LISTS = 6


def plan_table(plan: Plan, estimate: RunEstimate, *, every: bool = False) -> RenderableType:
    """Modules of one kind and shape on one line, with blocks and bytes, or `every` one on its own; then totals."""
    table = _modules_table(plan, every=every)
    totals = plan.totals
    lines = [
        f"{totals.modules} weights: {_before(plan)} -> {size(totals.bytes_after)} "
        f"({percent(totals.bytes_after, totals.bytes_before)}), "
        f"factors {percent(totals.factor_bytes, totals.bytes_before)} of dense",
        f"other weights: {size(totals.untouched_bytes)}, unchanged",
        *_estimated(estimate),
    ]
    folded = sum(module.stored_as == "dense" and module.block_size is not None for module in plan.modules)
    for key, count in Counter(row.modifier for row in plan.rearrangements).items():
        lines.append(f"{entry_name(key)}: reorders the input channels of {count} modules first; bytes stay")
    lines += _planned_caches(plan) + _planned_refinements(plan) + _planned_experts(plan)
    if folded:
        lines.append(
            f"{folded} factorised weights cannot be packed (that needs 2:4, blocks of a multiple of 4 columns, and rows of a "
            "multiple of 8): stored as the dense product A·S·B, without factors and no smaller than before"
        )
    lines += _dense_lines(plan)
    if plan.ignored:
        lines.append(f"held back by ignore: {', '.join(short(plan.ignored))}")
    lines += skipped_lines(plan) + overridden_lines(plan)
    lines += _shared_lines(plan)
    lines += plan.notes
    lines += warning_lines(plan)
    return Group(table, Text("\n".join(lines)))


def _estimated(estimate: RunEstimate) -> list[str]:
    """CPU time and time, as a whole and by what takes them, and memory."""
    how = "measured here on one layer" if estimate.probed else "estimated here"
    parts = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in estimate.cpu_seconds_by.items() if seconds >= 0.5)
    lines = [
        f"{how}: {estimate.cpu_seconds:.0f} s of CPU time, {estimate.seconds:.0f} s with {threads(estimate)}, "
        f"{size(estimate.peak_bytes)} peak memory without files"
    ]
    return [*lines, *([f"CPU time: {parts}"] if parts else []), *estimate.uncounted]


def threads(estimate: RunEstimate) -> str:
    """Of how many threads an estimate is, in words."""
    return "1 thread" if estimate.threads == 1 else f"{estimate.threads} threads"


def _before(plan: Plan) -> str:
    """The bytes of the plan's weights; of a compressed model as they are in it, with those of a dense one behind."""
    dense = size(plan.totals.bytes_before)
    return f"{size(plan.bytes_given)} ({dense} dense)" if plan.given else dense


def _blocks(names: Sequence[str]) -> str:
    """How many blocks there are; where they are not one list of layers, which: encoder and decoder, towers, single modules."""
    lists = short(names)
    if len(lists) <= 1:
        return _count(len(names), "layer")
    more = f" and {len(lists) - _MOST_LISTS} more" if len(lists) > _MOST_LISTS else ""
    return f"{_count(len(names), 'block')} ({', '.join(lists[:_MOST_LISTS])}{more})"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


class _OfModifier(Protocol):
    @property
    def modifier(self) -> str: ...


R = TypeVar("R", bound=_OfModifier)


def _by_modifier(rows: Iterable[R]) -> dict[str, list[R]]:
    """Rows by their modifier's name in the recipe, in order."""
    found: dict[str, list[R]] = {}
    for row in rows:
        found.setdefault(entry_name(row.modifier), []).append(row)
    return found


def _planned_caches(plan: Plan) -> list[str]:
    """One line a way of quantising keys and values."""
    found: dict[tuple[str, str], int] = Counter((entry_name(row.modifier), row.described) for row in plan.caches)
    return [
        f"{name}: {what}, on their way into the cache of {_count(number, 'attention module')}; a server may do it otherwise"
        for (name, what), number in found.items()
    ]


def _planned_refinements(plan: Plan) -> list[str]:
    """One line a refiner: how many modules, in how many units, on how many tokens."""
    return [
        f"{name}: trains the factors of {sum(len(r.modules) for r in rows)} of them, "
        f"{'all at once' if rows[0].layer is None else f'layer by layer ({len(rows)})'}, on {rows[0].tokens} tokens; bytes stay"
        for name, rows in _by_modifier(plan.refinements).items()
    ]


def warning_lines(plan: Plan) -> list[str]:
    """The plan's warnings, counted."""
    count = len(plan.warnings)
    return [
        f"warning {number} of {count}: {entry_name(one.modifier)}: {one.text}"
        for number, one in enumerate(plan.warnings, 1)
    ]


def _dense_lines(plan: Plan) -> list[str]:
    """A line for plain changed weights, whose bytes stay."""
    plain = sum(row.stored_as == "dense" and row.block_size is None for row in plan.stored.values())
    if not plain:
        return []
    return [
        f"{plain} weights are stored dense, and no smaller: `armor export FOLDER OUT --to armor` packs those that are 2:4"
    ]


def skipped_lines(plan: Plan) -> list[str]:
    """One line for modules that an entry leaves as they are for the same reason."""
    found: dict[tuple[str, str, str], list[Skipped]] = {}
    for one in plan.skipped:
        place = entry_name(one.modifier), one.kind, one.reason.replace(one.name, "{}")
        found.setdefault(place, []).append(one)
    return [
        f"left as {'it is' if len(rows) == 1 else 'they are'} by {entry}: {', '.join(short([row.name for row in rows]))} "
        f"({kind} {'x'.join(map(str, rows[0].shape))}): {rows[0].reason}"
        for (entry, kind, _), rows in found.items()
    ]


def overridden_lines(plan: Plan) -> list[str]:
    """One line for modules of which one entry asked the same, and another one, or a group of its own, counts."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for one in plan.overridden:
        found.setdefault((one.modifier, one.by, one.what), []).append(one.name)
    return [
        f"{what} of {entry_name(modifier)} is overridden for {_count(len(names), 'module')} by "
        f"{'a group of its own that matches them more closely' if by == modifier else entry_name(by)}: {', '.join(short(names))}"
        for (modifier, by, what), names in found.items()
    ]


def _shared_lines(plan: Plan) -> list[str]:
    """Which weights are those of several modules."""
    shared = {row.name: row.uses for row in plan.modules if row.uses}
    return [f"one weight, changed once: {', '.join((name, *uses))}" for name, uses in shared.items()]


def _planned_experts(plan: Plan) -> list[str]:
    """One line for all layers of experts that are alike: how many experts are taken, and how many tokens each can expect."""
    alike: dict[ExpertsPlan, list[str]] = {}
    for layer in plan.experts:
        alike.setdefault(replace(layer, layer=""), []).append(layer.layer)
    lines = []
    for like, layers in alike.items():
        tokens = "an unknown number" if like.expected_tokens is None else f"about {like.expected_tokens}"
        lines.append(
            f"{entry_name(like.modifier)}: {like.experts} of {like.total} experts in {len(layers)} layer(s), "
            f"{layers[0]}{f' to {layers[-1]}' if len(layers) > 1 else ''}; {tokens} of its calibration tokens reach each"
            + (
                f", fewer than the {like.minimum_tokens} of moe.minimum_tokens (below: {like.below})"
                if like.too_few
                else ""
            )
        )
    return lines


def _modules_table(plan: Plan, *, every: bool) -> Group:
    """A line for what a modifier stores in one way, and below it one for each kind of module, or for each module."""
    alike = grouped(plan.modules, lambda row: row.name, _kind, plan.layers)
    lines = [(row.name, [row]) for row in plan.modules] if every else alike
    cells = [
        (f"{entry_name(rows[0].modifier)}, {_stored_as(rows[0])}", name, *_plan_cells(rows, exact=every))
        for name, rows in lines
    ]
    title = f"Plan for {plan.model}: {_blocks(plan.layers)}"
    return modules_table(title, ("shape", "block", "blocks", "before", "after", "factors"), cells)


def one_of(values: Sequence[str], what: str) -> str:
    """A cell for modules that may differ in this: the value, or how many there are (`12 sizes`), or nothing."""
    count = len(set(values))
    return values[0] if count == 1 else what and f"{count} {what}"


def modules_table(title: str, headings: Sequence[str], lines: Sequence[tuple[str, ...]]) -> Group:
    """A table with its title, that fits 80 columns.

    A line is what its module has in common with others (a row above them), the module's name, and a cell for each heading.
    """
    parent = common_parent([name for _, name, *_ in lines])
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    table.add_column(f"module of {parent}" if parent else "module", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", overflow="fold", no_wrap=heading != "B of")
    for common in dict.fromkeys(line[0] for line in lines):
        table.add_row(Text(common, style="bold"))
        for _, name, *cells in (line for line in lines if line[0] == common):
            table.add_row(*(Text(cell) for cell in (f"  {name.removeprefix(f'{parent}.')}", *cells)))
    return Group(Text(title, style="italic"), table)


def _kind(row: ModulePlan) -> tuple[object, ...]:
    return row.modifier, row.d_out, row.d_in, _stored_as(row)


def _plan_cells(rows: Sequence[ModulePlan], *, exact: bool) -> tuple[str, ...]:
    """The cells of modules that are alike, their bytes together."""
    first = rows[0]
    before, after = sum(row.bytes_before for row in rows), sum(row.bytes_after for row in rows)
    return (
        f"{first.d_out}x{first.d_in}",
        one_of(["-" if row.block_size is None else "x".join(map(str, row.block_size)) for row in rows], "sizes"),
        one_of(["-" if row.blocks is None else "+".join(map(str, row.blocks)) for row in rows], ""),
        *((str(before), str(after)) if exact else (size(before), size(after))),
        percent(sum(row.factor_bytes for row in rows), before),
    )


def _stored_as(row: ModulePlan) -> str:
    """How a weight is stored, with what its numbers are where they are not floats of the model's dtype."""
    if row.quantized is not None:
        return row.quantized.described
    return row.stored_as if row.core == "float" else f"{row.stored_as} {row.core}"


def resolved_recipe(recipe: Recipe, *, every: bool = False) -> tuple[Text, Text]:
    """The recipe as it was resolved, with its hash; without `every` no sizes of single modules that a budget found.

    Print it with `soft_wrap`: lines of YAML are whole on any screen.
    """
    yaml = (recipe if every else replace(recipe, resolved=_without_sizes(recipe.resolved))).resolved_yaml()
    return Text(f"\nResolved recipe\nsha256 {recipe.hash()}"), Syntax(
        yaml, "yaml", background_color="default"
    ).highlight(yaml)


def _without_sizes(value: Any) -> Any:
    """The same with the number of modules in the place of more sizes than fit on a screen."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: f"{len(one)} modules, shown with --all"
        if key == "sizes" and isinstance(one, Mapping) and len(one) > _MOST_SIZES
        else _without_sizes(one)
        for key, one in value.items()
    }


def summary(result: Result) -> RenderableType:
    """Perplexity and size before and after, losses, counts, and where the checkpoint is."""
    table = Table(title="Result")
    table.add_column("", overflow="fold")
    for heading in ("before", "after", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    report = result.report
    for row in evaluation_rows(result.evaluations):
        table.add_row(*map(escape, row))
    small, large = report["size_after_bytes"], report["size_before_bytes"]
    table.add_row(
        "size on disk",
        "?" if large is None else size(large),
        size(small),
        "?" if large is None else f"{small / large:.3f}",
    )
    totals = totals_done(result.plan, result.modules, result.results)
    before = result.plan.bytes_given if result.plan.given else totals.bytes_before
    table.add_row(
        "pruned weights",
        size(before),
        size(totals.bytes_after),
        f"{totals.bytes_after / before:.3f}" if before else "-",
    )
    if any(module.modifier != GIVEN for module in result.modules.values()) or not result.plan.given:
        firsts, lasts = _mean_losses(result)
        table.add_row("mean relative loss", f"{firsts:.5f}", f"{lasts:.5f}", f"{lasts / firsts:.3f}" if firsts else "-")
    lines = [] if result.evaluations else ["perplexity: not measured, the recipe has no `evaluation`"]
    lines += [_calibration_line(row) for row in report["calibration"]]
    lines += _rearrangement_lines(result)
    lines += _refinement_lines(result)
    lines += _change_lines(result) + _expert_lines(result)
    lines += _dense_lines(result.plan)
    lines += skipped_lines(result.plan) + overridden_lines(result.plan) + warning_lines(result.plan)
    lines += [f"{name}: {count}" for name, count in sorted(total_counts(result).items())]
    lines.append(
        f"{totals.modules} modules in {report['seconds']:.0f} s, peak memory {size(report['peak_memory_bytes'])}"
    )
    if "resumed" in report:
        lines.append(
            f"{_count(report['resumed']['steps'], 'step')} were taken from a run before, which had been cut short"
        )
    lines.append(_against_plan(report))
    lines.append(f"checkpoint: {result.output}")
    experts = [_experts_table(report["experts"])] if report["experts"] else []
    return Group(table, *experts, Text("\n".join(lines)))


def _against_plan(report: Mapping[str, Any]) -> str:
    """What was predicted, and what came of it."""
    seconds = [f"{report[name]:.0f} s ({report[f'{name}_estimated']:.0f} s)" for name in ("cpu_seconds", "seconds")]
    peaks = [size(report[f"peak_{what}_bytes"]) for what in ("anonymous_memory", "memory_estimated")]
    return (
        f"CPU time {seconds[0]}, time {seconds[1]}, peak memory without files {peaks[0]} ({peaks[1]}); in brackets "
        "what was predicted"
    )


def _experts_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each layer of experts: calibration tokens of one, and how many saw too few."""
    table = Table(title="Calibration tokens of an expert")
    table.add_column("experts", overflow="fold")
    table.add_column("for", overflow="fold")
    for heading in ("number", "fewest", "median", "most", "too few"):
        table.add_column(heading, justify="right")
    for row in rows:
        numbers = [f"{row[key]:g}" for key in ("experts", "fewest", "median", "most", "below")]
        table.add_row(row["layer"], ", ".join(map(entry_name, row["modifiers"])), *numbers)
    return table


def _expert_lines(result: Result) -> list[str]:
    """What was done with experts that too few tokens reached, and units of training that they left nothing of."""
    lines = []
    for name, rows in _by_modifier(r for r in result.results if isinstance(r, ExpertBelow)).items():
        done = {"skip": "left as they were", "layer-moment": "calibrated on what all experts of their layer saw"}
        lines.append(
            f"{name}: {len(rows)} modules of experts saw fewer than {max(row.minimum for row in rows)} calibration tokens and were "
            f"{done[rows[0].done]}"
        )
    for name, units in _by_modifier(r for r in result.results if isinstance(r, UnitLeftOut)).items():
        lines.append(f"{name}: {len(units)} unit(s) not trained: all of their modules were left dense")
    return lines


def _calibration_line(row: Mapping[str, Any]) -> str:
    """Samples and datasets of one calibration set, with what was passed over and samples that were not to be had."""
    parts = []
    for source in row["sources"]:
        notes = ["a stream"] if source["stream"] else []
        notes += [f"{source['empty']} empty rows passed over"] if source["empty"] else []
        notes += [f"{source['short']} documents too short"] if source["short"] else []
        notes += [f"{source['cut']} cut to the sequence length"] if source.get("cut") else []
        parts.append(f"{source['taken']} of {source['dataset']}" + (f" ({', '.join(notes)})" if notes else ""))
    short = f", {row['asked']} asked for at most" if row["samples"] < row["asked"] else ""
    what = f"windows of {row['sequence_length']} tokens"
    if "inputs" in row:
        shapes = (f"{name} {'×'.join(map(str, each['shape']))}" for name, each in row["inputs"].items())
        what = f"samples of {', '.join(shapes)}"
    return f"calibrated on {row['samples']} {what}{short}: {', '.join(parts)}"


def _rearrangement_lines(result: Result) -> list[str]:
    """One line a rearranger: modules, and the mean of the score that their masks keep."""
    return [
        f"{name}: masks keep {_mean(r.kept_before for r in rows):.5f} -> "
        f"{_mean(r.kept_after for r in rows):.5f} of the score, {len(rows)} module(s) reordered"
        for name, rows in _by_modifier(result.rearrangements).items()
    ]


def _refinement_lines(result: Result) -> list[str]:
    """One line a refiner: units, steps, and the mean of their held-out losses; units that training did not better are counted."""
    lines = []
    for name, rows in _by_modifier(result.refinements).items():
        left, clipped = sum(min(r.losses) == r.losses[0] for r in rows), sum(r.clipped for r in rows)
        whole = sum(r.whole_batches for r in rows)
        lines.append(
            f"{name}: held-out loss {_mean(r.losses[0] for r in rows):.5f} -> "
            f"{_mean(min(r.losses) for r in rows):.5f}, {sum(r.steps for r in rows)} steps, {len(rows)} unit(s)"
            + (f", {clipped} gradient(s) clipped" if clipped else "")
            + (f", {whole} batch(es) only as a whole, on fewer cores" if whole else "")
            + (f", {left} of them left as before: training raised it; lower `learning_rate`" if left else "")
        )
    return lines


def _change_lines(result: Result) -> list[str]:
    """One line a factor modifier: modules, their core type, and the mean loss against the product before."""
    changes = [change for module in result.modules.values() for change in module.changes]
    return [
        f"{name}: {len(rows)} cores as {', '.join(sorted({r.core for r in rows}))}, loss against the factors before "
        f"{_mean(r.losses[0] for r in rows):.3g} -> {_mean(r.stored_loss for r in rows):.3g}"
        for name, rows in _by_modifier(changes).items()
    ]


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _mean_losses(result: Result) -> tuple[float, float]:
    modules = [module for module in result.modules.values() if module.modifier != GIVEN]
    count = max(1, len(modules))
    first = sum(module.losses[0] for module in modules) / count
    return first, sum(module.stored_loss for module in modules) / count


def total_counts(result: Result) -> Counter[str]:
    """How often something out of the ordinary was done, over all modules and what changed them afterwards."""
    counts = [module.counts for module in result.modules.values()]
    counts += [change.counts for module in result.modules.values() for change in module.changes]
    return sum((Counter(dict(count)) for count in counts), Counter())


def result_json(result: Result) -> dict[str, Any]:
    """The result as plain data for `--json`."""
    before, after = result.perplexity_before, result.perplexity_after
    return {
        "output": str(result.output),
        "perplexity_before": None if before is None else before.value,
        "perplexity_after": None if after is None else after.value,
        "evaluation": evaluation_json(result.evaluations),
        "modules": {name: _timed(module) for name, module in result.modules.items()},
        **{name: [_timed(row) for row in result.results if row.section == name] for name in sections(result.results)},
        "report": dict(result.report),
    }


def _timed(result: ModuleResult | StepResult) -> dict[str, Any]:
    return {**result.to_dict(), "seconds": result.seconds}


def size(count: float) -> str:
    """Bytes in the largest decimal unit that leaves a digit before the point."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "B" else f"{count:.0f} B"
        count /= 1000
    return f"{count:.3g} TB"


def percent(part: float, whole: float) -> str:
    """A share in percent, with one decimal."""
    return f"{100 * part / whole:.1f} %" if whole else "-"
