"""A sweep's points one after the other: each is planned before the first runs, and none is run that was run before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from armor_recipes.checkpoint.files import MANIFEST_FILE, write_whole
from armor_recipes.checkpoint.header import read_json
from armor_recipes.checkpoint.journal import journal_folder
from armor_recipes.checkpoint.lock import locked
from armor_recipes.checkpoint.staging import discard
from armor_recipes.checkpoint.verify import verify
from armor_recipes.errors import ArmorError, QualityError, RecipeError
from armor_recipes.events import Observer, ignore_events
from armor_recipes.modifiers import config_types
from armor_recipes.modifiers.kinds.contract import entry_name
from armor_recipes.paths import user_path
from armor_recipes.plan import Plan, RunEstimate
from armor_recipes.recipe import Recipe
from armor_recipes.recipe.sweep import Point, Sweep, load_sweep
from armor_recipes.report.page import write_page
from armor_recipes.report.sweep import point_figures, sweep_markdown, sweep_page, with_fronts
from armor_recipes.run.checks import check_places, check_writable
from armor_recipes.run.job import RECIPE_FILE, builtin_recipe_dir, execute
from armor_recipes.run.planning import Job, prepare
from armor_recipes.run.recipe_lock import run_hash
from armor_recipes.run.refusals import Refusals
from armor_recipes.run.writing import writing
from armor_recipes.version import __version__

T = TypeVar("T")
RESULT_FILE = "sweep.json"
#: What tells, in the folder of a point's reports, which run it is.
_POINT_FILE = "point.json"
_SHORT = 12
_ENDED = ("done", "rejected")
_KEPT = ": what was computed is kept, and the same command goes on"
_RUNS, _MODELS = "runs", "models"
_REPORTS = (MANIFEST_FILE, "report.json", RECIPE_FILE)

#: Runs a recipe, on a device, over an output that is there or not. Raises ArmorError.
Work = Callable[[Recipe, str, bool], None]


@dataclass(frozen=True, slots=True)
class Planned:
    """A point that can be run: its plan, what that is thought to take, and whether it was run before."""

    point: Point
    plan: Plan
    estimate: RunEstimate
    done: bool


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What sweep.json holds, and the errors of points that failed, by their names."""

    found: dict[str, Any]
    failed: Mapping[str, ArmorError]


def read_sweep(file: str | Path, *, overrides: Sequence[str] = (), output: str | None = None) -> Sweep:
    """Load and check a sweep file, all recipes of it. Raises RecipeError."""
    options: dict[str, Any] = {"registry": config_types(), "builtin_dir": builtin_recipe_dir()}
    return load_sweep(user_path(file), overrides=overrides, output=output, **options)


def plan_sweep(sweep: Sweep, *, device: str = "cpu", keep_models: bool = False) -> tuple[Planned, ...]:
    """Plan every point. Raises what is wrong with any of them as one error.

    Neither data nor weights are read, but where the output holds runs already: then they are, to tell which points those are of.
    With `keep_models` a point whose model is not there counts as not run, as in `run_sweep`.
    """
    output = user_path(sweep.output).resolve()
    has_runs = (output / _RUNS).is_dir()

    def planned(point: Point) -> Planned:
        job = _job(point, device)
        done = has_runs and _Run(point, run_hash(job), output, keep_models).is_done
        return Planned(point, job.plan, job.estimate, done)

    return tuple(found for _, found in _of_each(sweep, planned))


def work_here(
    recipe: Recipe, device: str, overwrite: bool, *, fresh: bool = False, observer: Observer = ignore_events
) -> None:
    """Run a recipe in this process, whose peak of memory is then that of all runs in it."""
    try:
        execute(prepare(recipe, device=device), overwrite=overwrite, fresh=fresh, observer=observer)
    except QualityError as error:
        cause: BaseException = error
        while isinstance(cause.__cause__, QualityError):  # without where the folder lies, which a sweep settles
            cause = cause.__cause__
        raise QualityError(str(cause)) from error


def run_sweep(
    sweep: Sweep,
    *,
    device: str = "cpu",
    keep_models: bool = False,
    work: Work = work_here,
    tell: Callable[[str], None] = lambda _: None,
) -> SweepResult:
    """Run every point of a sweep that was not run before, and write sweep.json, sweep.md and sweep.html after each.

    Args:
        sweep: what `read_sweep` gives.
        device: where to compute.
        keep_models: leave each point's checkpoint in `OUTPUT/models`, and run again what has none there. Without it the reports
            alone are kept.
        work: runs one recipe.
        tell: is called with a sentence as a point begins, is left out or fails, and with what its plan warns of.

    A point that fails is a row of the result, and no error; the next sweep runs it again.

    Raises:
        ArmorError: what is wrong with recipe, plan, data or output of any point before the first is run; the results cannot be
            written, or another sweep writes there.
    """
    found_of_each = _of_each(sweep, lambda point: _hash_and_notes(_job(point, device)))
    notes = {point.name: said for point, (_, said) in found_of_each}
    output = user_path(sweep.output).resolve()
    with locked(output):
        runs = [_Run(point, digest, output, keep_models) for point, (digest, _) in found_of_each]
        failed: dict[str, ArmorError] = {}
        found = _written(sweep, runs, failed)
        try:
            for number, run in enumerate(runs, start=1):
                where = f"point {number} of {len(runs)}, {run.point.name}"
                if run.is_done:
                    tell(f"{where}: was run before")
                    continue
                for text in (where, *notes[run.point.name]):
                    tell(text)
                try:
                    run.go(device, work)
                except ArmorError as error:
                    failed[run.point.name] = error
                    tell(f"{where} failed: {error}")
                found = _written(sweep, runs, failed)
        except BaseException as error:
            if not isinstance(error, Exception):
                done = sum(run.is_done for run in runs)
                error.add_note(f"{done} of {len(runs)} points are done: the same command goes on from there")
            raise
    return SweepResult(found, failed)


def _job(point: Point, device: str) -> Job:
    job = prepare(point.recipe, device=device)
    check_places(job.source, job.recipe)
    return job


def _hash_and_notes(job: Job) -> tuple[str, tuple[str, ...]]:
    """What tells its run from others, and what its plan says beside its rows."""
    warnings = (f"warning: {entry_name(one.modifier)}: {one.text}" for one in job.plan.warnings)
    return run_hash(job), (*job.plan.notes, *warnings)


def _of_each(sweep: Sweep, make: Callable[[Point], T]) -> list[tuple[Point, T]]:
    """What is made of each point. Raises what is wrong with the output, else with all points, as one error that names them."""
    _check_output(sweep)
    refused, made = Refusals(), []
    for point in sweep.points:
        with refused.noted(f"point {point.name}"):
            made.append((point, make(point)))
    if refused:
        refused.tell()
    return made


def _check_output(sweep: Sweep) -> None:
    """Raise RecipeError where the results cannot be written, or the folder holds something else."""
    output = user_path(sweep.output)
    check_writable(output, "output")
    if output.exists() and not output.is_dir():
        raise RecipeError(f"output {sweep.output} exists and is not a folder: choose another path")
    if output.is_dir() and any(output.iterdir()) and not _is_result(output / RESULT_FILE):
        raise RecipeError(
            f"output {sweep.output} exists and is of no sweep (no {RESULT_FILE} with results): choose another path"
        )
    for place in (output / _RUNS, output / _MODELS):
        if place.exists() and not place.is_dir():
            raise RecipeError(f"{place} exists and is not a folder: remove it, or choose another output")


def _is_result(file: Path) -> bool:
    """Whether a file holds results, and not a sweep or something else of that name."""
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(file.read_bytes())
        return isinstance(found, dict) and {"armor_recipes", "sweep", "points"} <= found.keys()
    return False


@dataclass(frozen=True, slots=True)
class _Run:
    """One point's run: `OUTPUT/models/HASH` is its output, `OUTPUT/runs/HASH` what is kept of it."""

    point: Point
    digest: str
    output: Path
    keeps: bool

    @property
    def reports(self) -> Path:
        return self.output / _RUNS / self.digest[:_SHORT]

    @property
    def model(self) -> Path:
        return self.output / _MODELS / self.digest[:_SHORT]

    @property
    def record(self) -> dict[str, Any]:
        """What is known of a run that has ended; empty where none has."""
        with suppress(OSError, ValueError):
            found = json.loads((self.reports / _POINT_FILE).read_bytes())
            if isinstance(found, dict) and found.get("sha256") == self.digest and found.get("status") in _ENDED:
                return found
        return {}

    @property
    def is_done(self) -> bool:
        """Whether all is there that is asked for: with `keeps` the whole model, too, or what a quality gate rejected of it."""
        status = self.record.get("status")
        if status is None or not self.keeps:
            return status is not None
        return self._has_files() if status == "done" else bool(self.rejected)

    def _has_files(self) -> bool:
        """Whether the output has all files that its manifest lists; their content is not read."""
        with suppress(ArmorError):
            listed = read_json(self.model / MANIFEST_FILE).get("files")
            return isinstance(listed, list) and all((self.model / str(name)).exists() for name in listed)
        return False

    def go(self, device: str, work: Work) -> None:
        """Run it, and keep its reports; a model that a gate rejects counts as run. Raises ArmorError."""
        path, recipe = str(self.model), self.point.recipe
        resolved = {**recipe.resolved, "output": {**recipe.resolved["output"], "path": path}}
        recipe = replace(recipe, output=recipe.output.model_copy(update={"path": path}), resolved=resolved)
        before = set(self.rejected)
        try:
            if not self._is_whole():
                work(recipe, device, self.model.is_dir())
        except QualityError as error:
            folder = next((place for place in self.rejected if place not in before), None)
            if folder is None:
                raise
            self._keep(folder, "rejected", str(error))
        else:
            self._keep(self.model, "done")

    @property
    def rejected(self) -> list[Path]:
        """Outputs of it that a gate has rejected."""
        return sorted(self.model.parent.glob(f"{self.model.name}.rejected*"))

    def _is_whole(self) -> bool:
        """Whether a run has put its output in place, and was cut short before its reports were kept."""
        if not self.model.is_dir() or journal_folder(self.model).is_dir():
            return False
        with suppress(ArmorError):
            return not verify(self.model).missing
        return False

    def _keep(self, folder: Path, status: str, error: str | None = None) -> None:
        """Keep the reports of an output in one step, and the output itself only where it is asked for."""
        record = {"sha256": self.digest, "status": status, "error": error}
        beside = self.reports.with_name(f".{self.reports.name}.new")
        with writing(self.reports, _KEPT):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            for name in _REPORTS:
                shutil.copyfile(folder / name, beside / name)
            write_page(beside, self.point.name)
            write_whole(beside / _POINT_FILE, (json.dumps(record, indent=2) + "\n").encode())
            if self.reports.exists():
                discard(self.reports, self.reports)
            beside.rename(self.reports)
        if not self.keeps:
            for place in dict.fromkeys([folder, *self.rejected]):
                discard(place, place)
            with suppress(OSError):  # something else is in it
                self.model.parent.rmdir()

    def row(self, error: ArmorError | None) -> dict[str, Any]:
        """The point in sweep.json."""
        record = self.record if error is None else {}
        status = record.get("status", "pending" if error is None else "failed")
        there = (
            [self.model] if status == "done" and self.model.is_dir() else self.rejected if status == "rejected" else []
        )
        return {
            "name": self.point.name,
            "values": dict(self.point.values),
            "status": status,
            "error": record.get("error") if error is None else str(error),
            "exit_code": None if error is None else error.exit_code,
            "sha256": self.digest,
            "reports": self.reports.relative_to(self.output).as_posix() if record else None,
            "model": there[-1].relative_to(self.output).as_posix() if there else None,
            **(point_figures(self.reports) if record else {}),
        }


def _written(sweep: Sweep, runs: Sequence[_Run], failed: Mapping[str, ArmorError]) -> dict[str, Any]:
    """What sweep.json holds, which is written, each file in one step."""
    output = runs[0].output
    rows = with_fronts([run.row(failed.get(run.point.name)) for run in runs])
    found = {"armor_recipes": __version__, "sweep": sweep.name, "points": rows}
    # The result first: by it the folder is known as a sweep's.
    texts = {
        RESULT_FILE: json.dumps(found, indent=2) + "\n",
        "sweep.html": sweep_page(found),
        "sweep.md": sweep_markdown(found),
    }
    with writing(output, _KEPT):
        output.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_whole(output / name, text.encode())
    return found
