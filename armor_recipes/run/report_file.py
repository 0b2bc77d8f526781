"""`--report FILE`: what report.json holds, in a file of one's own; `armor report`: the page of one run or several."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from armor_recipes.checkpoint.files import MANIFEST_FILE, write_whole
from armor_recipes.checkpoint.writer import manifest_hash
from armor_recipes.errors import InputError, RecipeError
from armor_recipes.paths import user_path
from armor_recipes.report.page import MARK, page, write_page
from armor_recipes.report.saved import Saved, later_row, read_saved
from armor_recipes.report.view import read_report, run_view
from armor_recipes.run.checks import check_writable
from armor_recipes.run.writing import writing

_KEY = "seconds_by_phase"


def check_report_file(path: Path) -> None:
    """Raise RecipeError, before anything is computed, where the report cannot be written, or would replace another file."""
    file = user_path(path)
    check_writable(file, "--report")
    if file.is_dir():
        raise RecipeError(f"--report {path} is a folder: name a file")
    if file.is_file() and not _is_report(file):
        raise RecipeError(
            f"--report {path} exists and is no report of this tool: it is not replaced; name another file"
        )


def write_report(path: Path, report: Mapping[str, Any], *, output: Path) -> None:
    """Write it in one step: whoever reads the file meets the old one or the new one.

    Raises ResourceError for a full disk, RecipeError for whatever else has come between; both name the checkpoint, which is there.
    """
    with writing(f"--report {path}", f"; the checkpoint is complete in {output}, and its report.json says the same"):
        _write(user_path(path), report)


def write_report_page(folders: Sequence[Path], output: Path | None, evaluations: Sequence[Path] = ()) -> Path:
    """Write the page of these runs to `output`; without one that of a single run into its folder, with report.md. Returns the file.

    What the files `evaluations`, of `armor eval --json`, say of a single run is kept in its report.json, and shown from there on.

    Raises RecipeError where `output` is missing for several, or is something else than a page of ours, or `evaluations` are for
    several; CheckpointError for a folder that is no run's; InputError for a file that is no evaluation of the folder; ResourceError
    for a full disk.
    """
    places = [user_path(folder) for folder in folders]
    if evaluations and len(places) > 1:
        raise RecipeError("--eval adds figures to the report of one run: name a single folder with it")
    if output is None and len(places) > 1:
        raise RecipeError("several runs make a page of their own: name it with --output FILE")
    if output is not None:
        check_writable(user_path(output), "--output")
        if user_path(output).exists() and not _is_page(user_path(output)):
            raise RecipeError(
                f"--output {output} exists and is no page of this tool: it is not replaced; name another file"
            )
    file = places[0] / "report.html" if output is None else user_path(output)
    saved = [read_saved(user_path(path)) for path in evaluations]
    with writing(file):
        if saved:
            _keep(places[0], saved)
        if output is None:
            write_page(places[0])
        else:
            _write_text(file, page([run_view(place, name) for place, name in zip(places, _names(places), strict=True)]))
    return file


def _names(places: Sequence[Path]) -> list[str]:
    """As many last parts of each path as tell it from the others; of one that is named twice all, with its number."""
    paths = [place.resolve() for place in places]
    names = []
    for number, path in enumerate(paths, start=1):
        ends = ["/".join(path.parts[-count:]) for count in range(1, len(path.parts))]
        alone = (end for end in ends if sum(f"/{end}" == other.as_posix()[-len(end) - 1 :] for other in paths) == 1)
        names.append(next(alone, f"{path.name} ({number})"))
    return names


def _keep(folder: Path, evaluations: Sequence[Saved]) -> None:
    """Put evaluations of a run's folder into its report.json, each in the place of an earlier one of its measure."""
    run_view(folder)  # a folder of a run
    first: dict[str, Saved] = {}
    for saved in evaluations:
        other = first.setdefault(saved.measure, saved)
        if other is not saved:
            raise RecipeError(
                f"--eval {other.file} and {saved.file} are both of {saved.measure}, of which a report shows one: leave one out"
            )
        if saved.manifest is None or saved.manifest != manifest_hash(folder):
            raise InputError(
                f"{saved.file} is not of {folder} as it is there (the hash of {MANIFEST_FILE} is another): "
                f"`armor eval {folder} --json` measures it"
            )
    report = read_report(folder)
    report["later"] = {**report.get("later", {}), **{saved.measure: later_row(saved) for saved in evaluations}}
    write_whole(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())


def _is_page(file: Path) -> bool:
    try:
        return file.is_file() and MARK.encode() in file.read_bytes()[:2000]
    except OSError:
        return False


def _write(file: Path, report: Mapping[str, Any]) -> None:
    _write_text(file, json.dumps(dict(report), indent=2) + "\n")


def _write_text(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.exists() and not file.is_file():  # a pipe, or /dev/stdout
        with contextlib.suppress(BrokenPipeError):  # whose reader is gone
            file.write_text(text, encoding="utf-8")
        return
    beside = file.with_name(f".{file.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        beside.write_text(text, encoding="utf-8")
        beside.replace(file)
    finally:
        beside.unlink(missing_ok=True)


def _is_report(file: Path) -> bool:
    try:
        found = json.loads(file.read_bytes() or b"{}")
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and (not found or _KEY in found)
