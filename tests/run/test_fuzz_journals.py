"""Whatever becomes of a journal: an error of ours, or a run that goes on to the right bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch

from armor_recipes.calibration.inputs import hash_inputs
from armor_recipes.checkpoint.journal import RECORDS_FILE, JournalFiles, read_records
from armor_recipes.checkpoint.writer import tensor_hashes
from armor_recipes.errors import ArmorError
from armor_recipes.events import Event, UnitRefined
from armor_recipes.run import apply
from armor_recipes.run.evaluating import recorded
from armor_recipes.session import journal
from armor_recipes.session.journal import FileJournal
from tests.support.engine import ARMOR, recipe
from tests.support.fuzz import Files, edit_json, every

T = TypeVar("T")
CPU, STAGE = torch.device("cpu"), "prune_stage"


def edited(lines: list[bytes], chance: Random) -> list[bytes]:
    """A record with one value changed and its check left as it was."""
    place = chance.randrange(len(lines))
    return [*lines[:place], edit_json(lines[place], chance).rstrip(b"\n") + b"\n", *lines[place + 1 :]]


def moved(lines: list[bytes], chance: Random) -> list[bytes]:
    """Records in another order, twice, or gone."""
    first, second = (chance.randrange(len(lines)) for _ in range(2))
    match chance.choice(["swap", "twice", "gone", "from another"]):
        case "swap":
            lines[first], lines[second] = lines[second], lines[first]
        case "twice":
            lines.insert(second, lines[first])
        case "gone":
            del lines[first]
        case _:
            lines[first:first] = [lines[second].replace(b"layers.0", b"layers.1")]
    return lines


def damaged(contents: Files, chance: Random) -> Files:
    """Cut, flipped, emptied, gone or exchanged files, and records that were edited or moved."""
    found, names = dict(contents), sorted(contents)
    name = RECORDS_FILE if chance.random() < 0.5 else chance.choice(names)
    content = found[name]
    match chance.choice(["cut", "flipped", "gone", "exchanged", "longer", "edited", "moved"]):
        case "cut":
            found[name] = content[: chance.randrange(len(content))]
        case "flipped":
            place = chance.randrange(len(content))
            found[name] = content[:place] + bytes([content[place] ^ 1 << chance.randrange(8)]) + content[place + 1 :]
        case "gone":
            del found[name]
        case "exchanged":
            other = chance.choice(names)
            found[name], found[other] = found[other], found[name]
        case "longer":
            found[name] = content + chance.choice([b"\n", b"{}\n", b"\0" * 100, content[-200:], b'{"kind": "step"}\n'])
        case "edited":
            found[RECORDS_FILE] = b"".join(edited(found[RECORDS_FILE].splitlines(keepends=True), chance))
        case "moved":
            found[RECORDS_FILE] = b"".join(moved(found[RECORDS_FILE].splitlines(keepends=True), chance))
    return found


def answer(act: Callable[[], T]) -> tuple[T | None, str]:
    """What it gives, or what an error of ours says."""
    try:
        return act(), ""
    except ArmorError as error:
        return None, str(error)


@dataclass(frozen=True)
class Taken:
    """What a run takes from a journal."""

    steps: Sequence[Any]
    evaluation: Any
    mark: Any
    training: Any


class Stopped:
    """A run that was interrupted in the training of the second layer, its journal, and the tensors of an undisturbed run."""

    def __init__(self, folder: Path, llama: Path) -> None:
        self.folder = folder / ".out.journal"
        self.recipe = recipe(llama, folder / "out", ARMORModifier=ARMOR, BlockRefineModifier={"held_out": 0.4})
        samples = {"dataset": "builtin:random-tokens", "samples": 3, "sequence_length": 12}
        self.recipe["evaluation"] = {"fidelity": samples}
        apply(self.recipe)
        self.wanted = tensor_hashes(folder / "out")
        shutil.rmtree(folder / "out")
        refined: list[Event] = []

        def stop(event: Event) -> None:
            refined.extend([event] if isinstance(event, UnitRefined) else [])
            if len(refined) == 2:
                raise KeyboardInterrupt

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "SNAPSHOT_SECONDS", 0.0)
            with pytest.raises(KeyboardInterrupt):
                apply(self.recipe, observer=stop)
        self.contents: Files = {path.name: path.read_bytes() for path in self.folder.iterdir()}
        records = read_records(self.folder)[0]
        self.of, self.next = records[0]["of"], records[-1]["step"]
        assert {record["kind"] for record in records} == {"run", "evaluation", "step", "block", "training"}
        self.healthy = self.taken()
        assert len(self.healthy.steps) == 3
        assert None not in (self.healthy.evaluation, self.healthy.mark, self.healthy.training)

    def put(self, contents: Files) -> None:
        """These files and no others."""
        self.folder.mkdir(exist_ok=True)
        for file in self.folder.iterdir():
            file.unlink()
        for name, content in contents.items():
            (self.folder / name).write_bytes(content)

    def taken(self) -> Taken:
        """All that a run takes of the journal that is there. Raises ArmorError."""
        found = FileJournal(self.folder, CPU)
        found.begin(self.of)
        mark = restored = None
        if found.mark is not None:
            mark = (found.mark.stage, found.mark.stack, found.mark.block, found.mark.steps)
            streams: Any = [SimpleNamespace(hidden=[torch.empty(0)] * 3, passes=0) for _ in range(2)]
            found.restore(found.mark, streams)
            restored = [[*map(hash_of, stream.hidden), stream.passes] for stream in streams]
        steps = []
        while (key := found.next_key(STAGE, None, None)) is not None:
            done = found.replay(key)
            assert done is not None
            weights = {name: hash_of(value) for name, value in done.changes.weights.items()}
            results = [result.record() for result in done.changes.results]
            steps.append((key, weights, list(done.changes.modules), results, done.share, done.passes))
        evaluation, training = found.evaluation("fidelity"), found.found_training(self.next)
        return Taken(
            steps,
            None if evaluation is None else (recorded(evaluation, self.folder), evaluation["files"]),
            None if mark is None else (mark, restored),
            None if training is None else (hash_inputs(training[0]), training[1]),
        )

    def read(self, contents: Files) -> None:
        """An error of ours, or a part of what the healthy one gives, in its order."""
        self.put(contents)
        found, said = answer(self.taken)
        assert (found is None) == ("--fresh" in said)
        if found is None:
            return
        assert found.steps == self.healthy.steps[: len(found.steps)]
        assert found.evaluation in (None, self.healthy.evaluation)
        assert found.mark in (None, self.healthy.mark)
        assert found.training in (None, self.healthy.training)
        assert found.training is None or len(found.steps) == 3

    def run(self, contents: Files) -> None:
        """An error of ours and what `--fresh` makes of it, or what the undisturbed run gives."""
        self.put(contents)
        done, said = answer(partial(apply, self.recipe, overwrite=True))
        assert (done is None) == ("--fresh" in said)
        if done is None:
            apply(self.recipe, overwrite=True, fresh=True)
        assert tensor_hashes(self.folder.parent / "out") == self.wanted
        assert not self.folder.exists()


def hash_of(tensor: torch.Tensor) -> str:
    return hash_inputs({"": tensor})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Stopped:
    return Stopped(tmp_path_factory.mktemp("stopped"), llama)


def forged(made: Stopped, chance: Random) -> None:
    """A value changed and all checks made anew: nothing can tell it from one that was written so, but no error is another's."""
    made.put(made.contents)
    records = [dict(record) for record in read_records(made.folder)[0]]
    place = chance.randrange(len(records))
    found = json.loads(edit_json(json.dumps(records[place]).encode(), chance))
    records[place] = found if isinstance(found, dict) else {"kind": found}
    (made.folder / RECORDS_FILE).unlink()
    files = JournalFiles(made.folder)
    for record in records:
        files.append(record)
    taken, said = answer(made.taken)
    assert (taken is None) == bool(said)


@every(150)
def test_damaged_journals_are_read(made: Stopped, chance: Random) -> None:
    made.read(damaged(made.contents, chance))


@every(24)
def test_damaged_journals_are_gone_on_from(made: Stopped, chance: Random) -> None:
    made.run(damaged(made.contents, chance))


@every(100)
def test_forged_journals(made: Stopped, chance: Random) -> None:
    forged(made, chance)


@pytest.mark.endurance
@pytest.mark.timeout(3600)
@every(8000)
def test_many_damaged_journals_are_read(made: Stopped, chance: Random) -> None:
    made.read(damaged(made.contents, chance))


@pytest.mark.endurance
@pytest.mark.timeout(3600)
@every(500)
def test_many_damaged_journals_are_gone_on_from(made: Stopped, chance: Random) -> None:
    made.run(damaged(made.contents, chance))


@pytest.mark.endurance
@pytest.mark.timeout(3600)
@every(1500)
def test_many_forged_journals(made: Stopped, chance: Random) -> None:
    forged(made, chance)
