"""Draws the plots of the experiments from their committed JSON: `make plots`, or `python tools/plots.py [NAME...]`.

`docs/assets/experiments/NAME.svg` is of `docs/benchmarks/experiments/NAME.json`, and carries that file's SHA-256
(`tests/docs/test_plots.py` compares). A name is an experiment's, `cores`, or that in a model's folder, `smollm2/cores`.
Text is of a grey that can be read on white and on black; there is no background.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
DATA, PLACE = ROOT / "docs" / "benchmarks" / "experiments", ROOT / "docs" / "assets" / "experiments"
GREY, COLOURS = "#7a7f87", ("#2f81f7", "#c77d0a", "#2da44e", "#cf4f8a", "#8a63d2", "#d1483f", "#1a9ba1", "#8a7a2a")
ARMOR = "prune_stage.armor_modifiers.ARMORModifier."
Rows = list[dict[str, Any]]
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "armor-recipes",
    "font.size": 10,
    "axes.prop_cycle": "",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.alpha": 0.3,
    "axes.grid": True,
    "legend.frameon": False,
    **dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), GREY
    ),
}


def fidelity(row: dict[str, Any]) -> tuple[float, float, float]:
    """The mean KL divergence from the dense model, and how far its interval reaches below and above."""
    found = row["evaluation"]["fidelity"]["after"]["kl_divergence"]
    low, high = found["interval"]
    return found["value"], found["value"] - low, high - found["value"]


def megabytes(row: dict[str, Any]) -> float:
    """Of the weight files."""
    return float(row["size_after_bytes"]) / 1e6


def name_points(axes: Any, rows: Rows, y: list[float]) -> None:
    """The rows' names beside their points, by bytes."""
    for row, value in zip(rows, y, strict=True):
        axes.annotate(
            row["name"].replace("block_size=", ""),
            (megabytes(row), value),
            xytext=(5, 5),
            textcoords="offset points",
        )


def block_size(rows: Rows, figure: Any) -> None:
    """Perplexity against bytes, named by the size; that of 1 is not packed."""
    axes = figure.subplots()
    y = [row["perplexity_after"] for row in rows]
    places = {row["values"][ARMOR + "block_size"]: (megabytes(row), row["perplexity_after"]) for row in rows}
    axes.plot(*zip(*(place for size, place in places.items() if size > 1), strict=True), "-o")
    if 1 in places:
        axes.plot(*places[1], "o", color=COLOURS[1])
    axes.axhline(rows[0]["perplexity_before"], color=GREY, linestyle="--", linewidth=1, label="dense")
    axes.plot(rows[0]["size_before_bytes"] / 1e6, rows[0]["perplexity_before"], "s", color=GREY)
    name_points(axes, rows, y)
    axes.set(xlabel="MB of the weight file", ylabel="perplexity")
    axes.legend()


def cores(rows: Rows, figure: Any) -> None:
    """Divergence against bytes."""
    axes = figure.subplots()
    y, below, above = zip(*map(fidelity, rows), strict=True)
    axes.errorbar([megabytes(row) for row in rows], y, (below, above), fmt="o", capsize=3)
    name_points(axes, rows, list(y))
    axes.set(xlabel="MB of the weight file", ylabel="KL divergence from dense, nats")


def patterns(rows: Rows, figure: Any) -> None:
    """Perplexity of both methods."""
    axes = figure.subplots()
    for method in ("ARMOR", "NoWag-P"):
        own = {row["name"].split()[1]: row["perplexity_after"] for row in rows if row["name"].startswith(method)}
        axes.plot(list(own), list(own.values()), "o", label=method)
    axes.axhline(rows[0]["perplexity_before"], color=GREY, linestyle="--", linewidth=1, label="dense")
    axes.set(
        yscale="log", yticks=(40, 60, 80, 120), yticklabels=(40, 60, 80, 120), xlabel="pattern", ylabel="perplexity"
    )
    axes.minorticks_off()
    axes.legend()


def by_name(rows: Rows, figure: Any) -> None:
    """Divergence of each, one below the other."""
    axes = figure.subplots()
    y, below, above = zip(*map(fidelity, rows), strict=True)
    axes.errorbar(y, range(len(rows)), xerr=(below, above), fmt="o", capsize=3)
    ticks = [tick for tick in (0.0001, 0.001, 0.01, 0.03, 0.1, 0.2) if min(y) / 1.2 < tick < 1.2 * max(y)]
    axes.set(yticks=range(len(rows)), yticklabels=[row["name"] for row in rows])
    axes.set(xscale="log", xticks=ticks, xticklabels=ticks, xlabel="KL divergence from dense, nats")
    axes.minorticks_off()
    axes.invert_yaxis()


def calibration_domain(rows: Rows, figure: Any) -> None:
    """Each objective on each text: like the test text, and on prose."""
    near, far = figure.subplots(1, 2)
    methods = list(dict.fromkeys(row["name"].rpartition(", dataset=")[0] for row in rows))
    for number, method in enumerate(methods):
        own = [row for row in rows if row["name"].rpartition(", dataset=")[0] == method]
        x = [place + 0.15 * (number - (len(methods) - 1) / 2) for place in range(len(own))]
        near.plot(x, [row["perplexity_after"] for row in own], "o", label=method)
        y, below, above = zip(*map(fidelity, own), strict=True)
        far.errorbar(x, y, (below, above), fmt="o", capsize=3)
        texts = [row["values"]["calibration.dataset"].removeprefix("builtin:") for row in own]
    for axes, label in ((near, "perplexity of pydoc-heldout"), (far, "KL divergence from dense on jargon, nats")):
        axes.set(xticks=range(len(texts)), xticklabels=texts, xlabel="calibrated on", ylabel=label)
    near.legend()


def calibration_samples(rows: Rows, figure: Any) -> None:
    """Means of the seeds, and each seed."""
    measures: dict[str, Callable[[dict[str, Any]], float]] = {
        "perplexity": lambda row: float(row["perplexity_after"]),
        "KL divergence from dense, nats": lambda row: fidelity(row)[0],
    }
    for axes, (label, of) in zip(figure.subplots(1, 2), measures.items(), strict=True):
        by: dict[int, list[float]] = {}
        for row in rows:
            samples = next(value for key, value in row["values"].items() if key.endswith("calibration.samples"))
            by.setdefault(samples, []).append(of(row))
        axes.plot(list(by), [sum(own) / len(own) for own in by.values()], "-")
        axes.plot(
            [size for size, own in by.items() for _ in own],
            [y for own in by.values() for y in own],
            "o",
            color=COLOURS[1],
        )
        axes.set(xscale="log", xticks=list(by), xticklabels=list(by), xlabel="calibration windows", ylabel=label)
        axes.minorticks_off()


def iterations(rows: Rows, figure: Any) -> None:
    """Loss and perplexity of each solver against the run's time."""
    for axes, key, label in zip(
        figure.subplots(1, 2), ("loss", "perplexity_after"), ("mean loss of the modules", "perplexity"), strict=True
    ):
        for solver in ("adam", "exact"):
            own = [row for row in rows if row["name"].startswith(solver)]
            if not own:
                continue
            axes.plot([row["cpu_seconds"] for row in own], [row[key] for row in own], "-o", label=solver)
            for row in own:
                text = row["name"].removeprefix(solver).strip()
                axes.annotate(
                    text, (row["cpu_seconds"], row[key]), xytext=(3, 5), textcoords="offset points", fontsize=8
                )
        seconds = [row["cpu_seconds"] for row in rows]
        scale = "log" if max(seconds) > 10 * min(seconds) else "linear"
        axes.set(xscale=scale, xlabel="CPU seconds of the run", ylabel=label)
        axes.legend()


def selection(rows: Rows, figure: Any) -> None:
    """Loss against steps."""
    axes = figure.subplots()
    for row in rows:
        line = "--" if "greedy" in row["name"] else "-"
        axes.plot(
            [int(mark.split()[0]) for mark in row["losses"]],
            list(row["losses"].values()),
            line,
            marker="o",
            label=row["name"],
        )
    marks = [int(mark.split()[0]) for mark in rows[0]["losses"]]
    axes.set(xscale="log", xticks=marks, xticklabels=marks, xlabel="steps", ylabel="relative loss")
    axes.minorticks_off()
    axes.legend(fontsize=8)


def speed(rows: Rows, figure: Any) -> None:
    """Tokens a second, of transformers' own dense model, one below the other; one line is the dense model by our kernels."""
    decode = [share(row, "decode of dense", "decode_of_dense") for row in rows]
    prompt = [share(row, "prefill of dense", "prompt_of_dense") for row in rows]
    parts = [(label, found) for label, found in (("decoding", decode), ("a prompt", prompt)) if any(found)]
    labels = [row["row"] if "row" in row else row["name"] for row in rows]
    for axes, (label, found) in zip(figure.subplots(1, len(parts), sharey=True, squeeze=False)[0], parts, strict=True):
        points = [(1.0, 1.0, 1.0) if one is None else one for one in found]
        x, below, above = zip(*((value, value - low, high - value) for value, low, high in points), strict=True)
        axes.errorbar(x, range(len(rows)), xerr=(below, above), fmt="o", capsize=3)
        for place, name in enumerate(labels):
            if name.startswith("dense by our kernels"):
                axes.axvline(x[place], color=COLOURS[1], linestyle="--")
        axes.set(yticks=range(len(rows)), yticklabels=labels, xlabel=f"{label}, of transformers' dense")
    axes.invert_yaxis()


def share(row: dict[str, Any], *keys: str) -> tuple[float, float, float] | None:
    """A ratio and the ends of its interval, kept as numbers or as a table shows them; None where there is none."""
    found = next((row[key] for key in keys if key in row), "-")
    if isinstance(found, dict):
        return found["value"], *found["interval"]
    numbers = [float(number) for number in re.findall(r"[\d.]+", found)]
    return (numbers[0], numbers[1], numbers[2]) if numbers else None


PLOTS: dict[str, Callable[[Rows, Any], None]] = {
    "block-size": block_size,
    "calibration-domain": calibration_domain,
    "calibration-samples": calibration_samples,
    "cores": cores,
    "iterations": iterations,
    "patterns": patterns,
    "permutation": by_name,
    "quantised-weights": by_name,
    "selection": selection,
    "speed": speed,
}


def source(name: str) -> str:
    """What a plot says of the file that it was drawn from."""
    return f"docs/benchmarks/experiments/{name}.json sha256:{hashlib.sha256((DATA / f'{name}.json').read_bytes()).hexdigest()}"


def names() -> list[str]:
    """Of all experiments that have figures, in order."""
    return sorted(file.relative_to(DATA).with_suffix("").as_posix() for file in DATA.rglob("*.json"))


def draw(name: str) -> None:
    """Write one plot; the same bytes for the same file and release of matplotlib."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.rcsetup import cycler

    content = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    with rc_context({**STYLE, "axes.prop_cycle": cycler(color=COLOURS)}):
        figure = Figure(figsize=(7.2, 3.6), layout="constrained")
        PLOTS[name.rpartition("/")[2]](content.get("points") or content["rows"], figure)
        (PLACE / name).parent.mkdir(parents=True, exist_ok=True)
        about = {"Date": None, "Creator": None, "Title": name, "Source": source(name)}
        figure.savefig(PLACE / f"{name}.svg", transparent=True, metadata=about)


if __name__ == "__main__":
    for name in sys.argv[1:] or names():
        draw(name)
