"""What a run has done so far, written as it goes on, so that another process can go on from there.

| record | holds |
|---|---|
| `run` | the first one: what all others rest on, by name |
| `same` | what is known later and must be the same again: the plan as settled, the teacher |
| `evaluation` | what one measure found of the dense model, and the files that it keeps; or of the compressed one |
| `step` | the changes of one step, committed |
| `block` | that all up to a block is done, with the activations at its door; or, without a block, a whole stack |
| `training` | a refiner's state in the middle of its training, of the step that comes next |
| `written` | that the output is complete, with the hash of its manifest: all that is left is to put it in its place |

Of `block` and `training` the latest counts, and the file of the one before is removed.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from armor_recipes.checkpoint.files import MANIFEST_FILE, save_tensors
from armor_recipes.checkpoint.journal import JournalFiles, Record, journal_folder, read_records
from armor_recipes.checkpoint.writer import file_hash
from armor_recipes.errors import CheckpointError, RecipeError
from armor_recipes.model.replay import Activations
from armor_recipes.modifiers.kinds.changes import Changes
from armor_recipes.modifiers.kinds.contract import Snapshot

#: Seconds between snapshots of a training.
SNAPSHOT_SECONDS = 180.0


_NUMBER, _PLACE = (int, float), {"stage": str, "stack": str, "passes": list}
#: What records hold beside their kind.
_FIELDS: Mapping[str, Mapping[str, Any]] = {
    "same": {"name": str, "value": str},
    "evaluation": {"name": str, "found": (dict, type(None)), "files": list},
    "step": {**_PLACE, "step": str, "share": _NUMBER, "file": str},
    "block": {**_PLACE, "block": (int, type(None)), "steps": int},
    "training": {"step": str, "steps": int, "state": dict, "file": str},
    "written": {"manifest": str},
}


@dataclass(frozen=True, slots=True)
class Mark:
    """That all steps of a stack before a block (None: of all its blocks) are done: `steps` in the whole run."""

    stage: str
    stack: str
    block: int | None
    steps: int
    record: Record


@dataclass(frozen=True, slots=True)
class Done:
    """A recorded step: its changes; the share of all work that was done by then; passes of the whole model, for each stream."""

    changes: Changes
    share: float
    passes: tuple[int, ...]


class Journal:
    """Remembers nothing: of a run that cannot be taken up again."""

    mark: Mark | None = None

    def knows(self, keys: Sequence[str]) -> bool:  # noqa: ARG002 - for those that do
        """Whether the steps that come next are recorded, under these keys."""
        return False

    def replay(self, key: str) -> Done | None:  # noqa: ARG002
        """The next step, if it is recorded. Raises CheckpointError where another one is."""
        return None

    def next_key(self, stage: str, stack: str | None, steps: int | None) -> str | None:  # noqa: ARG002
        """The key of the next step, if it is recorded, of that stage and stack, and among the first so many of the run."""
        return None

    def record(self, place: tuple[str, str], done: Done) -> None:
        """Add a step of a stage and stack."""

    def mapped(self, changes: Changes) -> dict[int, Tensor]:  # noqa: ARG002
        """Of the tensors of the step that was recorded or replayed last: id → the same numbers, mapped from the journal's file."""
        return {}

    def reach(self, place: tuple[str, str], block: int | None, streams: Sequence[Activations]) -> None:
        """Note that a stack is done up to a block, whose activations are these, or (None) to its end."""

    def restore(self, mark: Mark, streams: Sequence[Activations]) -> None:
        """Put activations back as they were at a mark."""

    def same(self, name: str, value: str) -> None:
        """Note a value, or raise RecipeError where the one that is noted is another."""

    def snapshot(self, key: str) -> Snapshot | None:  # noqa: ARG002
        """Where the state of a training is kept and found."""
        return None

    def written(self, manifest: Path) -> None:
        """Note that the output is complete, whose manifest this is."""


class FileJournal(Journal):
    """A journal in a folder. Nothing is written before `begin`.

    Attributes:
        is_begun: whether it is of this run.
        taken_up: how many steps were there when it was opened.
        notes: what of it could not be used, in sentences.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder, self.device = folder, device
        self._files = JournalFiles(folder)
        self._at = 0
        self._steps: list[Record] = []
        self.notes: list[str] = []
        self.taken_up = self._taken_evaluations = 0
        self.is_begun = False
        self._evaluations: dict[str, Record] = {}
        self._same: dict[str, Any] = {}
        self._training: Record | None = None

    def begin(self, of: Mapping[str, Any]) -> None:
        """Go on with the journal that is there, or begin one.

        Raises RecipeError, with every difference, where the one that is there is of something else, or does not tell of what.
        """
        wanted = json.loads(json.dumps(of))
        records = self._files.records
        if not records:
            if self._files.torn:
                raise RecipeError(
                    f"{self.folder}: its first record is damaged, so that what run it is of cannot be told: {FRESH}"
                )
            self._files.append({"kind": "run", "of": wanted})
            self.is_begun = True
            return
        found = records[0].get("of") if records[0].get("kind") == "run" else None
        if not isinstance(found, dict):
            raise RecipeError(f"{self.folder} is no journal of this version: {FRESH}")
        self._check(found, wanted)
        self.is_begun = True
        self._files.trim()
        if self._files.torn:
            self.notes.append(f"{self._files.torn} damaged record(s) at its end are left out")
        try:
            self._read()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RecipeError(f"{self.folder} is no journal of this version ({error!r}): {FRESH}") from error
        self.taken_up, self._taken_evaluations = len(self._steps), len(self._evaluations)

    def _check(self, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        differs = [name for name in dict.fromkeys([*found, *wanted]) if found.get(name) != wanted.get(name)]
        if differs:
            lines = [f"  {name}: {_said(found.get(name))} there, {_said(wanted.get(name))} now" for name in differs]
            raise RecipeError("\n".join([f"{self.folder} is the journal of another run:", *lines, FRESH]))

    def _read(self) -> None:
        """All records up to the first whose file is not what it was."""
        latest = {record["kind"]: place for place, record in enumerate(self._files.records) if "kind" in record}
        for place, record in enumerate(self._files.records):
            kind = record.get("kind")
            counts = kind in ("step", "evaluation") or latest.get(kind) == place
            whole = not counts or self._is_whole(record)
            if not whole and kind in ("step", "evaluation"):
                left = len(self._files.records) - place
                self.notes.append(
                    f"a file of record {place} is damaged or missing: the last {left} record(s) are left out"
                )
                self._files.cut(place)
                break
            if whole:
                self._take(record)
            elif counts:
                self.notes.append(f"{record.get('file')} is damaged or missing: what it held is computed again")
        if self.mark is not None and self.mark.steps > len(self._steps):
            self.mark = None
        self._remove_others()

    def _is_whole(self, record: Record) -> bool:
        named = record.get("files", [record] if "file" in record else [])
        return isinstance(named, list) and all(isinstance(one, dict) and self._files.is_whole(one) for one in named)

    def _take(self, record: Record) -> None:
        for name, kind in _FIELDS.get(record["kind"], {}).items():
            if not isinstance(record[name], kind):
                raise TypeError(f"{name} of a {record['kind']} record is {record[name]!r:.40}")
        if not all(isinstance(count, int) for count in record.get("passes", ())):
            raise TypeError(f"passes are {record['passes']!r:.40}")
        match record["kind"]:
            case "step":
                self._steps.append(record)
            case "same":
                self._same[record["name"]] = record["value"]
            case "evaluation":
                self._evaluations[record["name"]] = record
            case "block":
                self.mark = Mark(record["stage"], record["stack"], record["block"], record["steps"], record)
            case "training":
                self._training = record

    def _remove_others(self) -> None:
        """Files that no record names, and those of blocks and trainings that count no longer."""
        kept: set[str] = {str(record["file"]) for record in self._steps}
        kept |= {one["file"] for record in self._evaluations.values() for one in record["files"]}
        kept |= {str(one["file"]) for one in (self.mark and self.mark.record, self._training) if one and "file" in one}
        for file in self.folder.iterdir():
            if file.suffix == ".safetensors" and file.name not in kept:
                file.unlink(missing_ok=True)

    @property
    def holds_work(self) -> bool:
        """Whether there is more in it than what run it is of."""
        return any(record.get("kind") not in ("run", "same") for record in self._files.records)

    @property
    def is_taken_up(self) -> bool:
        """Whether there was something in it when it was opened."""
        return bool(self.taken_up or self._taken_evaluations)

    def remove(self) -> None:
        """All of it."""
        self._files.remove()

    # what was measured

    def evaluation(self, name: str) -> Record | None:
        """The record of a measure."""
        return self._evaluations.get(name)

    def record_evaluation(self, name: str, found: Any, files: Sequence[Path]) -> None:
        """Add what a measure found, and the files that it keeps in the journal's folder."""
        named = [self._files.took(file) for file in files]
        record = {"kind": "evaluation", "name": name, "found": found, "files": named, "time": time.time()}
        self._files.append(record)
        self._evaluations[name] = record

    # steps

    def knows(self, keys: Sequence[str]) -> bool:
        """Whether the steps that come next are recorded, under these keys."""
        return [record["step"] for record in self._steps[self._at : self._at + len(keys)]] == list(keys)

    def next_key(self, stage: str, stack: str | None, steps: int | None) -> str | None:
        """The key of the next step, if it is recorded, of that stage and stack, and among the first so many of the run."""
        for record in self._steps[self._at : steps][:1]:
            if record["stage"] == stage and stack in (None, record["stack"]):
                return str(record["step"])
        return None

    def replay(self, key: str) -> Done | None:
        """The next step, if it is recorded. Raises CheckpointError where another one is, or its file does not hold it."""
        if self._at == len(self._steps):
            return None
        record = self._steps[self._at]
        if record["step"] != key:
            raise CheckpointError(
                f"{self.folder}: the step {record['step']} is recorded where the run does {key}, so it is of another one: {FRESH}"
            )
        changes = Changes.load(self.folder / record["file"], self.device)
        self._at += 1
        return Done(changes, record["share"], tuple(record["passes"]))

    def record(self, place: tuple[str, str], done: Done) -> None:
        """Add a step: its file, then the record."""
        stage, stack = place
        file = self._files.write(f"{len(self._steps):06d}.safetensors", done.changes.save)
        told = {"stage": stage, "stack": stack, "step": done.changes.step, "passes": list(done.passes)}
        record = {"kind": "step", **told, "share": done.share, **file, "time": time.time()}
        self._files.append(record)
        self._steps.append(record)
        self._at = len(self._steps)
        self._training = self._replaced(self._training, None)

    def mapped(self, changes: Changes) -> dict[int, Tensor]:
        """Of the tensors of the step that was recorded or replayed last: id → the same numbers, mapped from its file."""
        return changes.mapped(self.folder / self._steps[self._at - 1]["file"])

    # activations

    def reach(self, place: tuple[str, str], block: int | None, streams: Sequence[Activations]) -> None:
        """Note that a stack is done up to a block, whose activations are these, or (None) to its end."""
        if self._at < len(self._steps):  # a run before has come further
            return
        tensors = {
            f"{number}/{batch}": hidden.contiguous()
            for number, stream in enumerate(streams)
            for batch, hidden in enumerate(stream.hidden)
        }
        file = (
            self._files.write(f"block-{self._number}.safetensors", lambda path: save_tensors(tensors, path))
            if tensors
            else {}
        )
        (stage, stack), passes = place, [stream.passes for stream in streams]
        told = {"stage": stage, "stack": stack, "block": block, "steps": len(self._steps), "passes": passes}
        record = {"kind": "block", **told, **file, "time": time.time()}
        self._files.append(record)
        self._replaced(None if self.mark is None else self.mark.record, record)
        self.mark = Mark(stage, stack, block, len(self._steps), record)

    def restore(self, mark: Mark, streams: Sequence[Activations]) -> None:
        """Put activations back as they were at a mark. Raises CheckpointError where they are not those of these streams."""
        found, passes = self._tensors(mark.record), mark.record["passes"]
        if len(passes) != len(streams):
            raise CheckpointError(
                f"{self.folder}: activations of {len(passes)} sets, and not of {len(streams)}: {FRESH}"
            )
        for number, stream in enumerate(streams):
            kept = [found.get(f"{number}/{batch}") for batch in range(len(stream.hidden))]
            if any(one is None for one in kept):
                raise CheckpointError(
                    f"{self.folder}: {mark.record.get('file')} does not hold the activations of this run: {FRESH}"
                )
            stream.hidden[:] = [one for one in kept if one is not None]
            stream.passes = passes[number]

    # later values

    def same(self, name: str, value: str) -> None:
        """Note a value, or raise RecipeError where the one that is noted is another."""
        if name not in self._same:
            self._files.append({"kind": "same", "name": name, "value": value})
            self._same[name] = value
        self._check({name: self._same[name]}, {name: value})

    def written(self, manifest: Path) -> None:
        """Note that the output is complete, whose manifest this is."""
        self._files.append({"kind": "written", "manifest": file_hash(manifest), "time": time.time()})

    # training

    def snapshot(self, key: str) -> Snapshot | None:
        """Where the state of a training is kept and found."""
        return _TrainingSnapshot(self, key)

    def found_training(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state of the training that is the next step, where there is one."""
        record = self._training
        if record is None or (record["step"], record["steps"]) != (key, self._at):
            return None
        return self._tensors(record), record["state"]

    def record_training(self, key: str, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Replace the state of the training that is the next step."""
        own = {name: value.contiguous() for name, value in tensors.items()}
        file = self._files.write(f"training-{self._number}.safetensors", lambda path: save_tensors(own, path))
        told = {"step": key, "steps": self._at, "state": dict(state)}
        record = {"kind": "training", **told, **file, "time": time.time()}
        self._files.append(record)
        self._training = self._replaced(self._training, record)

    @property
    def _number(self) -> int:
        """A number that no file has."""
        return len(self._files.records)

    def _replaced(self, old: Record | None, new: Record | None) -> Record | None:
        """The new record, once the file of the old one is gone."""
        if old is not None and "file" in old:
            (self.folder / old["file"]).unlink(missing_ok=True)
        return new

    def _tensors(self, record: Record) -> dict[str, Tensor]:
        """The tensors of a record's file, in memory of their own."""
        if "file" not in record:
            return {}
        file = self.folder / record["file"]
        try:
            with safe_open(file, framework="pt", device=str(self.device)) as opened:
                return {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118 - no mapping
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} cannot be read ({error}): {FRESH}") from error


class _TrainingSnapshot:
    """The state of one training, written at most every `SNAPSHOT_SECONDS`."""

    def __init__(self, journal: FileJournal, key: str) -> None:
        self._journal, self._key, self._last = journal, key, time.monotonic()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that was written last."""
        return self._journal.found_training(self._key)

    def due(self) -> bool:
        """Whether it is time for another."""
        return time.monotonic() - self._last >= SNAPSHOT_SECONDS

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write the state in the place of the one before."""
        self._journal.record_training(self._key, tensors, state)
        self._last = time.monotonic()


def in_place(output: Path) -> bool:
    """Whether what lies there is what the run of its journal wrote: it was cut short after it had put it there.

    Told by the manifest alone.
    """
    try:
        output = output.resolve()
        records, _, damaged = read_records(journal_folder(output))
        last = records[-1] if records and not damaged else {}
        return last.get("kind") == "written" and last.get("manifest") == file_hash(output / MANIFEST_FILE)
    except (OSError, ValueError, CheckpointError):  # a name that cannot be one among them
        return False


FRESH = "pass --fresh to start over, which removes it"


def _said(value: Any) -> str:
    return "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
