"""report.html and report.md: a run, or several side by side, in one file that needs no network."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

from armor_recipes.checkpoint.files import write_whole
from armor_recipes.report.view import run_view
from armor_recipes.version import __version__

#: By which a page is known as one of ours.
MARK = '<meta name="generator" content="armor-recipes report">'


def write_page(folder: Path, name: str | None = None) -> None:
    """Write report.html and report.md of a run's folder beside what they are made from. Raises CheckpointError as `run_view`."""
    run = run_view(folder, name)
    write_whole(folder / "report.html", page([run]).encode())
    write_whole(folder / "report.md", markdown(run).encode())


def page(runs: Sequence[Mapping[str, Any]]) -> str:
    """The page of one run, or of several side by side. Whatever text they hold is shown as text."""
    if len(runs) == 1:  # whose recipe it shows, and no key that another run has otherwise
        title, runs = runs[0]["model"], [{**runs[0], "keys": []}]
    else:
        title = f"{len(runs)} runs side by side"
    return filled("report", title, list(runs), beside="report.md, report.json and armor_manifest.json beside it")


def filled(script: str, title: str, data: Any, *, beside: str) -> str:
    """A page that a script of ours draws from the data; `beside` names the files that say the same."""
    here = files(__package__) / "page"
    parts = {
        name: (here / file).read_text(encoding="utf-8")
        for name, file in {
            "css": "page.css",
            "echarts": "echarts.js",
            "common": "common.js",
            "script": f"{script}.js",
        }.items()
    }
    texts = {"title": title, "version": __version__, "beside": beside}
    parts |= {name: html.escape(text) for name, text in texts.items()} | {"data": _in_script(data)}
    template = (here / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template)


def _in_script(data: Any) -> str:
    """JSON that may stand in a script element: no text in it ends that, or begins a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def markdown(run: Mapping[str, Any]) -> str:
    """A table of the figures before and after and a line of what it took, for the summary of a CI job."""
    rows = [f"| {cell(run['model'])} | before | after |", "|---|---:|---:|"]
    rows += [f"| {cell(name)} | {shown(a, unit)} | {shown(b, unit)} |" for name, a, b, unit in run["summary"]]
    took = [
        f"{what} {shown(actual, unit)}" + (f" ({shown(planned, unit)} planned)" if planned is not None else "")
        for what, planned, actual, unit in run["cost"]
    ]
    origin = dict(run["origin"])
    recipe, machine = origin["SHA-256 of the recipe"][:12], cell(origin["machine class"])
    return "\n".join(
        [*rows, "", f"{len(run['modules'])} modules; {'; '.join(took)}; on {machine}; recipe `{recipe}`.", ""]
    )


def cell(text: str) -> str:
    """A text in a table's cell, without a meaning in Markdown or HTML."""
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def shown(value: Any, unit: str) -> str:
    """A figure in its unit, with its interval if it has one; nothing for None."""
    match value:
        case None:
            return ""
        case [middle, low, high]:
            return f"{shown(middle, unit)} [{shown(low, unit)}, {shown(high, unit)}]"
    if unit == "B":
        return f"{value / 1e6:.2f} MB"
    return f"{value:.0f} s" if unit == "s" else f"{value:.4g}" if abs(value) < 1 else f"{value:.3f}"
