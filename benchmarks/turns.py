"""Records of rivals that take turns: kept one by one, compared within turns, told as a table (see `benchmarks/rivals.py`)."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

RESAMPLES = 10_000


@dataclass(frozen=True, slots=True)
class Row:
    """An engine with a form of the model. `like` is the form of llama.cpp that it is compared with; `block` is ARMOR's."""

    engine: str
    form: str
    like: str
    block: int | None = None

    @property
    def name(self) -> str:
        """As `--rows` takes it."""
        return " ".join([self.engine, *([str(self.block)] if self.block else []), self.form])


DENSE = Row("transformers", "bf16", "BF16")
#: The dense folder by `armor_recipes.load`: kernels for heads, plain layers and attention, but no 2:4.
KERNELS = Row("dense by our kernels", "bf16", "BF16")


def interval(ratios: Sequence[float]) -> tuple[float, float]:
    """95 % of the medians of resampled turns."""
    values = np.array(ratios)
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(np.median(values[picks], axis=1), [2.5, 97.5])
    return float(low), float(high)


Turns = Mapping[int, Mapping[str, Mapping[str, Any]]]
"""Records by turn and row."""


def versus(turns: Turns, task: str, name: str, other: str) -> str:
    """How many times as fast as another row, median and interval over the turns that have both."""
    pairs = [(turn[name], turn[other]) for turn in turns.values() if {name, other} <= turn.keys()]
    ratios = [
        b["seconds"][task] / a["seconds"][task] for a, b in pairs if task in a["seconds"].keys() & b["seconds"].keys()
    ]
    if not ratios or name == other:
        return "-"
    low, high = interval(ratios)
    return f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}]"


def table(
    rows: Mapping[str, Row], turns: Turns, reasons: Mapping[str, str], batch: int, tokens: Mapping[str, int]
) -> str:
    """One batch size as Markdown; a row without a record tells the reason.

    Args:
        rows: by name.
        turns: their records.
        reasons: why rows have no record.
        batch: sequences at once.
        tokens: by task, how many of a sequence its seconds are of.
    """
    head = [f"batch {batch}", "turns"]
    for task in tokens:
        head += [f"{task} tok/s", "of dense [95 %]", "of dense by our kernels [95 %]", "of llama.cpp's [95 %]"]
    head += ["anonymous MB", "resident MB", "weights MB"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        own = [turn[name] for turn in turns.values() if name in turn]
        if own:
            lines.append("| " + " | ".join([name, str(len(own)), *cells(row, turns, own, batch, tokens)]) + " |")
        elif name in reasons:
            lines.append(
                "| " + " | ".join([name, "0", reasons[name].replace("|", "/"), *["-"] * (len(head) - 3)]) + " |"
            )
    return "\n".join(lines)


def figures(
    row: Row, turns: Turns, own: Sequence[Mapping[str, Any]], batch: int, tokens: Mapping[str, int]
) -> dict[str, Any]:
    """A row's tokens a second with their ratios as text, by task; memory and size in MB."""
    found: dict[str, Any] = {"name": row.name, "turns": len(own)}
    for task, length in tokens.items():
        seconds = [one["seconds"][task] for one in own if task in one["seconds"]]
        found[task] = round(batch * length / statistics.median(seconds), 2) if seconds else None
        found[f"{task}_of_dense"] = versus(turns, task, row.name, DENSE.name)
        found[f"{task}_of_kernels"] = versus(turns, task, row.name, KERNELS.name)
        found[f"{task}_of_llama"] = versus(turns, task, row.name, f"llama.cpp {row.like}")
    for kind in ("anonymous", "resident"):
        found[f"{kind}_mb"] = round(max(one["peak_bytes"][kind] for one in own) / 1e6)
    return found | {"weights_mb": round(own[0]["weight_bytes"] / 1e6)}


def cells(
    row: Row, turns: Turns, own: Sequence[Mapping[str, Any]], batch: int, tokens: Mapping[str, int]
) -> Iterator[str]:
    """A row's figures as text, behind its name and turns."""
    for name, value in list(figures(row, turns, own, batch, tokens).items())[2:]:
        yield "-" if value is None else f"{value:.2f}" if name in tokens else str(value)


def origins(rows: Iterable[str], turns: Turns) -> str:
    """How each row ran, as a list: versions, choices, and how busy the machine was."""
    lines = []
    for name in rows:
        own = [turn[name] for turn in turns.values() if name in turn]
        if own:
            loads = [one["load_average"] for one in own]
            info = ", ".join(f"{key} {value}" for key, value in own[-1]["info"].items() if value)
            lines.append(f"- {name}: {info}; load average {min(loads):.1f} to {max(loads):.1f}")
    return "\n".join(lines)


def turns_in(folder: Path, names: Iterable[str]) -> Turns:
    """The records that a folder has of rows."""
    found: dict[int, dict[str, Any]] = {}
    numbers = sorted(int(place.name.removeprefix("turn")) for place in folder.glob("turn*"))
    for number in numbers:
        files = {name: record_file(folder, number, name) for name in names}
        kept = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items() if file.exists()}
        found[number] = kept
    return found


def record_file(folder: Path, turn: int, name: str) -> Path:
    """Where the record of a row in a turn lies."""
    return folder / f"turn{turn}" / f"{file_name(name)}.json"


def file_name(name: str) -> str:
    """A row's name without blanks."""
    return name.replace(" ", "-").replace(":", "of")


def keep(file: Path, found: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(".half")
    half.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    half.replace(file)
