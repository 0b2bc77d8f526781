"""A run that was cut short and goes on: what its journal is of, and what becomes of it as the run ends."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from armor_recipes.calibration.inputs import hash_inputs
from armor_recipes.checkpoint.header import read_json
from armor_recipes.checkpoint.journal import journal_folder
from armor_recipes.checkpoint.verify import verify
from armor_recipes.compute.ranks import agree, ranks
from armor_recipes.errors import ArmorError, RecipeError, ResourceError
from armor_recipes.events import PhaseStarted
from armor_recipes.modifiers.kinds.module import ModulePlan
from armor_recipes.modifiers.kinds.refiner import RefinePlan
from armor_recipes.plan.memory import activation_bytes
from armor_recipes.recipe.recipe import hash_of
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.report.machine import machine_class
from armor_recipes.report.manifest import used_by, versions
from armor_recipes.report.measure import Stopwatch
from armor_recipes.run.data import Data
from armor_recipes.run.planning import Job
from armor_recipes.session.journal import FileJournal, Journal, in_place

#: Bytes of a number that is not in packed factors: float32, and what it is stored as, at most as much.
_UNPACKED = 8
#: Copies of what is trained in the state of a training: as it is, the best, two moments.
_STATES = 4


@contextmanager
def journaled(output: Path, job: Job, *, in_memory: bool, fresh: bool) -> Iterator[Journal]:
    """The journal of an output, for a run of this job: kept where the run is cut short after it has done something, else removed.

    What cuts it short then says so. A model in memory and modifiers of llm-compressor have none, since nobody could tell whether a
    later process has the same before it.

    Raises RecipeError where there is one that such a run cannot go on with. With `fresh` what is there is removed.
    """
    folder = journal_folder(output)
    if fresh:
        FileJournal(folder, job.device).remove()
    if in_memory or job.recipe.steps:
        if folder.exists():
            raise RecipeError(
                f"{folder} is the journal of another run, and one of a model in memory or with modifiers of llm-compressor has "
                "none: pass --fresh (in Python `fresh=True`) to remove it, or choose another output.path"
            )
        yield Journal()
        return
    journal = FileJournal(folder, job.device)
    try:
        yield journal
    except BaseException as error:
        if not journal.is_begun:
            raise
        if not (journal.holds_work and _may_go_on(error)):
            journal.remove()
            raise
        said = (
            f"what was done is kept in {folder}: the same command goes on from there, and with --fresh it starts over"
        )
        if isinstance(error, ArmorError):
            raise type(error)(f"{error}; {said}") from error
        error.add_note(said)
        raise
    journal.remove()


def complete(output: Path) -> Mapping[str, Any] | None:
    """The report of an output that the run of its journal had put in its place before it was cut short; None where it had not, or
    where the folder is not what its manifest says.
    """
    if not in_place(output):
        return None
    with suppress(ArmorError):
        if not verify(output).missing:
            return read_json(output / "report.json")
    return None


def journal_bytes(job: Job, output: Path, samples: Mapping[CalibrationSpec, int] | None = None) -> int:
    """What the journal of a run takes at most beside what is there of it: the changes of all steps; activations, and the state of a
    training, each twice while it is replaced. Without what evaluation keeps.

    Activations are of as many samples as the recipe asks for, or of those that were read.
    """
    if job.recipe.steps:
        return 0
    trained = max((_trained(job, row) for row in job.plan.refinements), default=0)
    replaced = activation_bytes(job.plan, job.recipe, job.shapes, job.modifiers, samples) + 4 * _STATES * trained
    folder = journal_folder(output)
    there = sum(file.stat().st_size for file in folder.iterdir()) if folder.is_dir() else 0
    return max(0, sum(_step_bytes(job)) + 2 * replaced - there)


def _step_bytes(job: Job) -> Iterator[int]:
    """What the changes of each row take: packed factors, or whole weights."""
    packed: dict[str, int] = {}
    for module in job.plan.modules:
        packs = module.stored_as == "packed" and job.packed
        if packs:
            packed[module.name] = max(packed.get(module.name, 0), module.bytes_after)
        yield module.bytes_after if packs else _UNPACKED * module.d_out * module.d_in
    for row in (row for row in job.plan.rows if not isinstance(row, ModulePlan)):
        own = packed if isinstance(row, RefinePlan) else {}
        for name in row.touches:
            yield own.get(name) or _UNPACKED * sum(p.numel() for p in job.shapes.get_submodule(name).parameters())


def _trained(job: Job, row: RefinePlan) -> int:
    """How many numbers a refiner trains, but for norms."""
    core = getattr(job.modifiers[row.modifier], "trains_core", False)
    stored = [job.plan.stored[name] for name in row.modules]
    return sum(m.factor_bytes // m.itemsize + core * m.d_out * m.d_in // 2 for m in stored)


def _may_go_on(error: BaseException) -> bool:
    """Whether the same run would not end in the same way again: it was interrupted or terminated, or disk or memory ran out."""
    return isinstance(error, ResourceError) or not isinstance(error, Exception)


def begin(journal: Journal, job: Job, data: Data, model: nn.Module, source_sha256: str, watch: Stopwatch) -> None:
    """Let the journal go on, or begin. Raises RecipeError where it is of another run."""
    if not isinstance(journal, FileJournal):
        return
    journal.begin(_of(job, data, model, source_sha256))
    if journal.is_taken_up:
        watch.observer(PhaseStarted(f"going on with {journal.folder}: {journal.taken_up} steps are done"))
    for note in journal.notes:
        watch.observer(PhaseStarted(f"{journal.folder}: {note}"))


def resumed_row(journal: Journal) -> dict[str, Any]:
    """For report.json: what was taken from a run before; nothing where nothing was."""
    if not (isinstance(journal, FileJournal) and (journal.is_taken_up or journal.notes)):
        return {}
    return {"resumed": {"steps": journal.taken_up, "notes": journal.notes}}


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 in hex of named tensors."""
    return hash_inputs(tensors)


def check_alike(job: Job) -> None:
    """Raise RecipeError where one process alone can do the job, or those that do it together are not alike."""
    if ranks().size > 1 and (job.recipe.steps or job.device.type != "cpu"):
        what = "modifiers of llm-compressor" if job.recipe.steps else f"--device {job.device}"
        raise RecipeError(
            f"a run with {what} takes one process, and this is one of {ranks().size}: start it without torchrun"
        )
    agree(_of_all(job))


def _of_all(job: Job) -> dict[str, str]:
    """What the bytes of a run rest on besides model and data, by name."""
    # A run that memory was too little for goes on with more.
    model = {key: value for key, value in job.recipe.resolved["model"].items() if key != "memory"}
    return {
        "recipe": hash_of({**job.recipe.resolved, "model": model}),
        "plan": job.plan.sha256,
        **{f"version of {name}": value for name, value in versions().items()},
        "version of python": platform.python_version(),
        "device": job.device.type,
        **{f"machine.{name}": _short(value) for name, value in machine_class(job.device.type).items()},
    }


def _of(job: Job, data: Data, model: nn.Module, source_sha256: str) -> dict[str, Any]:
    """All that the bytes of a run rest on, by name, as short as it can be told."""
    buffers = {name: value for name, value in model.named_buffers() if value is not None}
    return {
        **_of_all(job),
        "model": source_sha256,
        "model.config": _hash(job.source.config.to_dict()),
        "model.buffers": hash_tensors(buffers),
        "model.dtypes": f"{job.source.stored_dtype}, computed in {job.source.compute_dtype}",
        **{f"tokens of {', '.join(used_by(job.recipe, spec))}": found.sha256 for spec, found in data.tokens.items()},
        **{f"data of evaluation.{measure.name}": measure.sha256 for measure in data.measures},
    }


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _short(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


__all__ = ["begin", "check_alike", "complete", "hash_tensors", "in_place", "journaled", "resumed_row"]
