"""A run as its report shows it: rows of figures and words from manifest, report.json and recipe of a folder."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from armor_recipes.checkpoint.files import MANIFEST_FILE
from armor_recipes.checkpoint.header import read_json
from armor_recipes.checkpoint.verify import RECIPE_FILE, has_recipe, read_resolved
from armor_recipes.errors import CheckpointError
from armor_recipes.recipe.leaves import leaves, of_the_run
from armor_recipes.report.names import shared

#: What lies in a name before its first number, and that.
_BLOCK = re.compile(r"(?:[^.]+\.)*?\d+(?=\.)")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
#: What was done out of the ordinary, in words, by its name in the manifest's counts.
_COUNTS = {"gram_jitter": "damping retries", "dead_channels": "dead channels", "zero_weight": "weights of zeros alone"}
#: Of report.json; a reader takes this one and earlier ones, which had no number.
REPORT_VERSION = 1
_BY_PHASE = ("cpu_seconds_by_phase", "peak_memory_bytes_by_phase")
Json = Mapping[str, Any]


def run_view(folder: Path, name: str | None = None) -> dict[str, Any]:
    """Plain data of a run, by the parts of its page, under the folder's name or another. It holds no path of this machine.

    Raises CheckpointError where the folder holds no run, or its files are not what one writes.
    """
    for file in (MANIFEST_FILE, "report.json"):
        if not (folder / file).is_file():
            raise CheckpointError(
                f"{folder} holds no {file}: name the output folder of a run (an export has no report)"
            )
    manifest, report = read_json(folder / MANIFEST_FILE), read_report(folder)
    recipe = read_resolved(folder / RECIPE_FILE) if has_recipe(folder) else None
    if recipe is None:
        raise CheckpointError(
            f"{folder / RECIPE_FILE} is missing or holds no recipe: restore it, or run the recipe again"
        )
    try:
        view: dict[str, Any] = _finite(_view(name or folder.resolve().name, manifest, report, recipe))
        _check_shown(view)
        return view
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise CheckpointError(
            f"{folder}: {MANIFEST_FILE} and report.json do not hold what a run writes ({type(error).__name__}: {error}); restore "
            "them, or run the recipe again"
        ) from error


def _check_shown(view: Json) -> None:
    """Raise TypeError where a figure is no number, or what is said of the run's origin no text."""
    for what, *values, _unit in (*view["summary"], *view["cost"]):
        for value in values:
            if isinstance(value, list) and len(value) != 3:
                raise TypeError(f"{what} {value!r:.80} is no figure with its interval")
            for number in value if isinstance(value, list) else (value,):
                if not isinstance(number, int | float | None):
                    raise TypeError(f"{what} {number!r:.80} is no number")
                float(number or 0)  # an integer may be larger than any
    for what, text in view["origin"]:
        if not isinstance(text, str):
            raise TypeError(f"{what} {text!r} is no text")


def read_report(folder: Path) -> dict[str, Any]:
    """A run's report.json. Raises CheckpointError where it is none, or of a later release."""
    report = read_json(folder / "report.json")
    version = report.get("report_version", REPORT_VERSION)
    if not isinstance(version, int) or version > REPORT_VERSION:
        raise CheckpointError(
            f"{folder / 'report.json'} is of report_version {version}, and this release reads {REPORT_VERSION}: take a later "
            "release"
        )
    return report


def _view(name: str, manifest: Json, report: Json, recipe: Json | None) -> dict[str, Any]:
    places = report.get("modules", {})
    modules = [_module(n, row, places.get(n, {}), report) for n, row in manifest.get("modules", {}).items()]
    depth, seeds = report.get("depth", {}), list(_seeds(recipe))
    told = {} if recipe is None else shared(recipe)
    return {
        "name": name,
        "model": str(manifest["model"]["id"]),
        "version": str(manifest["armor_recipes"]),
        "summary": list(_summary(manifest, report, modules)),
        "origin": [*_origin(manifest, report), *([["seeds", ", ".join(seeds)]] if seeds else [])],
        "recipe": yaml.safe_dump(told, sort_keys=False, allow_unicode=True) if told else "",
        "keys": [[".".join(path), text] for path, text in leaves(of_the_run(told))] if told else [],
        "modules": modules,
        "depth": [[row["block"], row["error"]] for row in depth.get("blocks", [])],
        "depth_note": depth.get("note", "This run did not record it."),
        "counts": list(_counts(manifest)),
        "experts": [
            [row["layer"], ", ".join(map(_entry, row["modifiers"]))]
            + [row[key] for key in ("experts", "fewest", "median", "most", "below")]
            for row in manifest.get("experts", [])
        ],
        "refinements": [
            [row["unit"], _entry(row["modifier"]), row["losses"][0], min(row["losses"]), row["steps"]]
            for row in manifest.get("refinements", [])
        ],
        "notes": list(_notes(manifest)),
        "cost": list(_cost(report)),
        "phases": [
            [phase, seconds, *(report.get(key, {}).get(phase) for key in _BY_PHASE)]
            for phase, seconds in report["seconds_by_phase"].items()
        ],
        "loads": [[row["runtime"], row["loads"], row["how"]] for row in report.get("loads", [])],
    }


def _module(name: str, row: Json, place: Json, report: Json) -> dict[str, Any]:
    """One module: where it is, and its figures; what a run did not record is None."""
    match = _BLOCK.match(name)
    block = place.get("block") or (match[0] if match else name)
    last = row["changes"][-1] if row.get("changes") else row
    counts: Counter[str] = Counter(row.get("counts", {}))
    for change in row.get("changes", []):
        counts.update(change.get("counts", {}))
    before = place.get("bytes_before")
    return {
        "name": name,
        "block": block,
        "kind": _NUMBER.sub("*", name.removeprefix(f"{block}.")),
        "first": row["first_loss"],
        "loss": row["stored_loss"],
        "error": row["relative_error"],
        "overhead": 100 * place["factor_bytes"] / before if before else None,
        "bytes": 100 * place["bytes_after"] / before if before else None,
        "masks": _percent(row.get("measures", {}).get("masks_changed")),
        "seconds": report["seconds_by_module"].get(name),
        "tokens": last["tokens"],
        "retries": counts["gram_jitter"],
        "dead": counts["dead_channels"],
        "steps": row["iterations"],
        "stop": row["stop_reason"],
        "curve": [list(pair) for pair in zip(place.get("iterations", []), place.get("losses", []), strict=True)],
    }


def _summary(manifest: Json, report: Json, modules: list[dict[str, Any]]) -> Iterator[list[Any]]:
    """Figures before and after: name, the two, and their unit."""
    found = manifest["evaluation"]
    measures = {"": {key: found.get(key) for key in ("before", "after")}}
    measures |= {f"{name} ": both for name, both in found.items() if name not in ("before", "after")}
    for prefix, both in measures.items():
        before, after = both["before"] or {}, both["after"] or {}
        for name, value in after.items():
            if _is_figure(name, value):
                yield [(prefix + name).replace("_", " "), _figure(before.get(name)), _figure(value), ""]
    for measure, both in report.get("later", {}).items():
        before = both["before"] or {}
        for name, value in both["after"].items():
            label = f"{measure} {name}" if measure not in name else name
            yield [f"{label.replace('_', ' ')} (armor eval)", _figure(before.get(name)), _figure(value), ""]
    yield ["size on disk", report["size_before_bytes"], report["size_after_bytes"], "B"]
    totals = manifest["totals"]
    yield ["weights of the modules", totals["bytes_before"], totals["bytes_after"], "B"]
    solved = [row for row in modules if row["stop"] != "as it was in the model"]
    if solved:
        yield ["mean relative loss", *(sum(row[key] for row in solved) / len(solved) for key in ("first", "loss")), ""]


def _is_figure(name: str, value: Any) -> bool:
    """Whether it is a measure's result: one with an interval, or a perplexity or time."""
    return (isinstance(value, dict) and "value" in value) or (isinstance(value, int | float) and "perplexity" in name)


def _figure(value: Any) -> Any:
    """A value, or one with its interval as `[value, low, high]`."""
    if not isinstance(value, dict):
        return value
    return [value["value"], *value["interval"]] if value.get("interval") else value["value"]


def _origin(manifest: Json, report: Json) -> Iterator[list[str]]:
    """Where the run came from, as names and words."""
    model, machine, compute = manifest["model"], manifest.get("machine", {}), manifest["compute"]
    yield ["model", f"{model['id']}" + (f" at {model['revision']}" if model["revision"] else "")]
    yield ["SHA-256 of its weights", model["sha256"]]
    yield ["SHA-256 of the recipe", manifest["recipe_sha256"]]
    for row in manifest["calibration"]:
        taken = ", ".join(f"{each['taken']} of {each['dataset']}" for each in row["sources"])
        length = "" if row["sequence_length"] is None else f" of {row['sequence_length']} tokens"
        yield [f"samples of {', '.join(map(_entry, row['modifiers']))}", f"{row['samples']}{length}: {taken}"]
    yield ["started", report["started"]]
    yield ["versions", ", ".join([f"armor-recipes {manifest['armor_recipes']}", *_pairs(manifest["versions"])])]
    cpu = " ".join(str(machine[key]) for key in ("architecture", "vendor", "level") if machine.get(key))
    yield ["machine class", f"{cpu}{', ' + machine['gpu'] if 'gpu' in machine else ''}" or report["platform"]]
    yield ["computed on", f"{compute['device']} in {compute['compute_dtype']}, stored in {compute['stored_dtype']}"]
    yield ["threads and processes", f"{report['threads']}, {report.get('processes', 1)}"]
    if "resumed" in report:
        yield ["taken from a run before", f"{report['resumed']['steps']} steps"]


def _seeds(value: Any, place: str = "") -> Iterator[str]:
    """The recipe's seeds, each after the key that it stands under."""
    for key, inner in value.items() if isinstance(value, dict) else ():
        if key == "seed":
            yield f"{place} {inner}"
        yield from _seeds(inner, str(key))


def _counts(manifest: Json) -> Iterator[list[Any]]:
    """What was done out of the ordinary: what, how often, in how many modules."""
    total: Counter[str] = Counter()
    where: Counter[str] = Counter()
    for row in manifest.get("modules", {}).values():
        for counts in (row.get("counts", {}), *(change["counts"] for change in row.get("changes", []))):
            total.update(counts)
            where.update(counts.keys())
    for name, count in sorted(total.items()):
        yield [_COUNTS.get(name, name.replace("_", " ")), count, where[name]]


def _notes(manifest: Json) -> Iterator[str]:
    """Warnings, and what was left as it was."""
    for row in manifest.get("warnings", []):
        yield f"{_entry(row['modifier'])}: {row['text']}"
    for row in manifest.get("skipped", []):
        yield f"{row['name']} was left as it is by {_entry(row['modifier'])}: {row['reason']}"
    for row in manifest.get("passes_of_the_whole_model", []):
        yield f"{row['stack']}: {row['passes']} passes of the whole model: {row['reason']}"


def _cost(report: Json) -> Iterator[list[Any]]:
    """What it took against what was planned: what, planned, actual, unit."""
    yield ["time", report["seconds_estimated"], report["seconds"], "s"]
    if "cpu_seconds" in report:
        yield ["CPU time", report["cpu_seconds_estimated"], report["cpu_seconds"], "s"]
    if "peak_anonymous_memory_bytes" in report:
        yield [
            "peak memory without files",
            report["peak_memory_estimated_bytes"],
            report["peak_anonymous_memory_bytes"],
            "B",
        ]
    yield ["peak memory, libraries and files included", None, report["peak_memory_bytes"], "B"]


def _pairs(versions: Json) -> list[str]:
    return [f"{name} {version}" for name, version in versions.items()]


def _entry(key: str) -> str:
    """A modifier's name in its recipe."""
    return key.split(".", 2)[-1]


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _finite(value: Any) -> Any:
    """The same with None for numbers that JSON has no word for."""
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
