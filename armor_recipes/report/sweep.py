"""What came of a sweep: a row for each point, from its manifest and report.json, which points no other beats, page and table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from armor_recipes.checkpoint.files import MANIFEST_FILE
from armor_recipes.checkpoint.header import read_json
from armor_recipes.errors import CheckpointError
from armor_recipes.recipe.sweep import short_key
from armor_recipes.report.page import cell, filled, shown
from armor_recipes.report.view import run_view

Row = Mapping[str, Any]
#: The key of what a point's weight files take.
SIZE = "size_after_bytes"


def point_figures(folder: Path) -> dict[str, Any]:
    """Figures of a run from its manifest and report.json; None for what it did not measure.

    Raises CheckpointError where these are not what a run writes.
    """
    try:
        view = run_view(folder)
        manifest, report = read_json(folder / MANIFEST_FILE), read_json(folder / "report.json")
        found = _figures(manifest, report, [row["loss"] for row in view["modules"]])
        for name, value in found.items():
            if name not in ("device", "resumed", "evaluation") and not (value is None or math.isfinite(value)):
                raise ValueError(f"{name} {value!r}")
    except (CheckpointError, AttributeError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        said = str(error) if isinstance(error, CheckpointError) else f"{type(error).__name__}: {error}"
        raise CheckpointError(
            f"{folder} does not hold what a run writes ({said}): remove it, and it is run again"
        ) from error
    return found


def _figures(manifest: Row, report: Row, losses: Sequence[float]) -> dict[str, Any]:
    totals, evaluation = manifest["totals"], manifest["evaluation"]
    before, after = (evaluation[when] or {} for when in ("before", "after"))
    agreement = (evaluation.get("fidelity") or {"after": {}})["after"].get("top1_agreement")
    return {
        "perplexity_before": before.get("perplexity"),
        "perplexity_after": after.get("perplexity"),
        "agreement": None if agreement is None else agreement["value"],
        "loss": sum(losses) / len(losses) if losses else None,
        "size_before_bytes": report["size_before_bytes"],
        "size_after_bytes": report["size_after_bytes"],
        "factor_overhead": totals["factor_bytes"] / totals["bytes_before"] if totals["bytes_before"] else None,
        "device": manifest["compute"]["device"],
        "seconds": report["seconds"],
        "cpu_seconds": report["cpu_seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "peak_anonymous_memory_bytes": report["peak_anonymous_memory_bytes"],
        "resumed": "resumed" in report,
        "evaluation": evaluation,
    }


def with_fronts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows with `front`: `size`, `time` or both, where no other point is as good in quality and in this, and better in one.

    Only points that are done take part; in the front of time none that went on from a journal, of which the time is not the whole,
    and in that of size none that is no smaller than its dense model, which is as good.
    """
    done = [row for row in rows if row["status"] == "done"]
    whole, quality = [row for row in done if not row["resumed"]], quality_of(rows)
    smaller = [row for row in done if not _dense_is_better(row, quality)]
    fronts = {"size": set(_front(smaller, quality, SIZE)), "time": set(_front(whole, quality, time_of(rows)))}
    return [{**row, "front": [what for what, names in fronts.items() if row["name"] in names]} for row in rows]


def quality_of(rows: Iterable[Row]) -> str:
    """The key of what tells how good a point is, the lower the better: perplexity, or mean loss where a point has none."""
    done = [row for row in rows if row["status"] == "done"]
    return "perplexity_after" if all(row["perplexity_after"] is not None for row in done) else "loss"


def time_of(rows: Iterable[Row]) -> str:
    """The key of what tells how long a point takes: CPU time, which others on the machine change less, but where a GPU computes."""
    return "seconds" if any(row["device"] != "cpu" for row in rows if row["status"] == "done") else "cpu_seconds"


def _dense_is_better(row: Row, quality: str) -> bool:
    """Whether the point's dense model has no more perplexity and no more bytes. By losses dense models are not compared."""
    dense, size = row.get("perplexity_before"), row.get("size_before_bytes")
    if quality != "perplexity_after" or dense is None or None in (size, row[SIZE]):
        return False
    return bool(dense <= row[quality] and size <= row[SIZE])


def _front(rows: Sequence[Row], quality: str, cost: str) -> Iterable[str]:
    """Names of the rows that no other is better than in one and at least as good as in the other."""
    found = [(row[quality], row[cost], row["name"]) for row in rows if None not in (row[quality], row[cost])]
    for q, c, name in found:
        if not any(x <= q and y <= c and (x, y) != (q, c) for x, y, _ in found):
            yield name


def sweep_page(found: Row) -> str:
    """The page of what sweep.json holds: a table, and plots of quality against bytes, time and what was varied."""
    rows = found["points"]
    paths = dict.fromkeys(path for row in rows for path in row["values"])
    data = {
        "points": [{key: value for key, value in _public(row).items() if key != "evaluation"} for row in rows],
        "quality": quality_of(rows),
        "time": time_of(rows),
        "keys": [[path, short_key(path, paths)] for path in paths],
    }
    return filled("sweep", f"{found['sweep']}: {len(rows)} points", data, beside="sweep.md and sweep.json beside it")


def sweep_markdown(found: Row) -> str:
    """The same as a table for a CI summary or a page of documentation."""
    rows = [_public(row) for row in found["points"]]
    columns = [column for column in _COLUMNS if any(row.get(column[1]) is not None for row in rows)]
    lines = [
        f"| {' | '.join(['point', *(name for name, *_ in columns), 'best at'])} |",
        f"|---|{'---:|' * len(columns)}---|",
    ]
    for row in rows:
        figures = [shown(None if row.get(key) is None else scale * row[key], unit) for _, key, unit, scale in columns]
        best = " and ".join(row["front"]) if row["status"] == "done" else row["status"]
        lines.append(f"| {' | '.join([cell(row['name']), *figures, best])} |")
    notes = [f"{cell(row['name'])}: {row['status']}: {cell(row['error'])}" for row in rows if row["error"]]
    return "\n".join([*lines, *(f"\n{note}" for note in notes), ""])


#: Name, key, unit, and what the figure is multiplied by.
_COLUMNS = (
    ("perplexity before", "perplexity_before", "", 1),
    ("after", "perplexity_after", "", 1),
    ("agreement", "agreement", "", 1),
    ("mean loss", "loss", "", 1),
    ("size", "size_after_bytes", "B", 1),
    ("factors, % of dense", "factor_overhead", "", 100),
    ("time", "seconds", "s", 1),
    ("CPU time", "cpu_seconds", "s", 1),
    ("peak memory", "peak_anonymous_memory_bytes", "B", 1),
)


def _public(row: Row) -> dict[str, Any]:
    """A row that names no path of this machine, as the errors of failed points may."""
    failed = f"exit code {row['exit_code']}; sweep.json has the message"
    return {**row, "error": failed if row["status"] == "failed" else row["error"]}
