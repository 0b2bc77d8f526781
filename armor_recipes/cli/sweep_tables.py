"""A sweep's plan and result as tables of 80 columns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from armor_recipes.cli.tables import percent, size, threads, warning_lines
from armor_recipes.report.sweep import Row, quality_of, time_of
from armor_recipes.run.sweep import Planned


def plan_json(planned: Sequence[Planned]) -> dict[str, Any]:
    """The points with their estimates as plain data for `--json`."""
    rows = [
        {
            "name": each.point.name,
            "values": each.point.values,
            "totals": asdict(each.plan.totals),
            "estimate": asdict(each.estimate),
            "done": each.done,
        }
        for each in planned
    ]
    return {"points": rows, "cpu_seconds": sum(each.estimate.cpu_seconds for each in planned if not each.done)}


def plan_table(planned: Sequence[Planned]) -> Group:
    """A line for each point: what the modules of its plan take, and the run, where it was not run before."""
    table = _empty("modules", "factors", "CPU time", "time", "memory")
    for each in planned:
        totals, estimate = each.plan.totals, each.estimate
        table.add_row(
            Text(each.point.name),
            size(totals.bytes_after),
            percent(totals.factor_bytes, totals.bytes_before),
            *(
                ("done", "", "")
                if each.done
                else (f"{estimate.cpu_seconds:.0f} s", f"{estimate.seconds:.0f} s", size(estimate.peak_bytes))
            ),
        )
    left = [each.estimate for each in planned if not each.done]
    cpu, seconds = (sum(getattr(estimate, name) for estimate in left) for name in ("cpu_seconds", "seconds"))
    points = f"{len(left)} points" if len(left) == len(planned) else f"{len(left)} of {len(planned)} points"
    notes = dict.fromkeys(
        note for each in planned for note in (*each.plan.notes, *warning_lines(each.plan), *each.estimate.uncounted)
    )
    whole = (
        f"{points}, one after the other: {cpu:.0f} s of CPU time, {seconds:.0f} s with "
        f"{threads(planned[0].estimate)}; memory without files"
    )
    return Group(table, Text("\n".join([whole, *notes])))


def result_table(rows: Sequence[Row]) -> Table:
    """A line for each point; left out are figures that no point has, losses where perplexities are compared, one of the times."""
    columns = {heading: [show(row) for row in rows] for heading, show in _COLUMNS.items()}
    columns = {heading: cells for heading, cells in columns.items() if any(cells)}
    columns.pop("time" if time_of(rows) == "cpu_seconds" else "CPU time", None)
    if quality_of(rows) == "perplexity_after":
        columns.pop("loss", None)
    table = _empty(*columns)
    for row, *cells in zip(rows, *columns.values(), strict=True):
        table.add_row(Text(row["name"]), *cells)
    return table


def _empty(*headings: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("point", overflow="fold")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _shown(key: str, show: Callable[[Any], str]) -> Callable[[Row], str]:
    """A cell of a figure; nothing where there is none."""
    return lambda row: "" if row.get(key) is None else show(row[key])


def _best(row: Row) -> str:
    if row["status"] != "done":
        return str(row["status"])
    return "both" if len(row["front"]) > 1 else "".join(row["front"])


_COLUMNS: Mapping[str, Callable[[Row], str]] = {
    "perplexity": _shown("perplexity_after", lambda value: f"{value:.3f}"),
    "agreement": _shown("agreement", lambda value: f"{value:.4f}"),
    "loss": _shown("loss", lambda value: f"{value:.4f}"),
    "size": _shown("size_after_bytes", size),
    "factors": _shown("factor_overhead", lambda value: percent(value, 1)),
    "CPU time": _shown("cpu_seconds", lambda value: f"{value:.0f} s"),
    "time": _shown("seconds", lambda value: f"{value:.0f} s"),
    "memory": _shown("peak_anonymous_memory_bytes", size),
    "best": _best,
}


def result_lines(rows: Sequence[Row], output: str) -> list[str]:
    """What the table does not say."""
    dense = {(row["perplexity_before"], row["size_before_bytes"]) for row in rows if "loss" in row}
    lines = [
        "dense: "
        + ", ".join(
            [*([] if before is None else [f"perplexity {before:.3f}"]), *([] if nbytes is None else [size(nbytes)])]
        )
        for before, nbytes in sorted(dense, key=str)
        if (before, nbytes) != (None, None)
    ]
    compared = quality_of(rows) == "perplexity_after"
    what = "perplexity" if compared else "loss"
    clock = "CPU time" if time_of(rows) == "cpu_seconds" else "time"
    dense_too = "; nor has the dense model, of size" if compared else ""
    lines.append(f"best: no other point has no more {what} and size (or {clock}), and less of one{dense_too}")
    lines += [f"{row['name']}: {row['status']}: {row['error']}" for row in rows if row["error"]]
    lines += [
        f"{row['name']}: went on from a journal; time is of its last process" for row in rows if row.get("resumed")
    ]
    return [*lines, f"results: {Path(output) / 'sweep.html'}"]
