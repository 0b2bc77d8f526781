"""Journals of other runs, damaged ones, full disks, and `armor status`."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from armor_recipes.checkpoint import journal as files
from armor_recipes.checkpoint.journal import JournalFiles, read_records
from armor_recipes.checkpoint.lock import locked
from armor_recipes.checkpoint.writer import tensor_hashes
from armor_recipes.errors import ArmorError, CheckpointError, InputError, RecipeError, ResourceError
from armor_recipes.evaluation.fidelity import Fidelity
from armor_recipes.events import Event, LayerStarted, PhaseStarted, UnitRefined
from armor_recipes.run import apply
from armor_recipes.run.resuming import journal_bytes
from armor_recipes.run.status import status
from armor_recipes.session import journal
from armor_recipes.session.journal import FileJournal
from tests.support.disks import fill, mounted
from tests.support.engine import ARMOR, ATTENTION, MLP, core, make_job, make_model, recipe

JOURNAL = ".out.journal"
TRAINED: dict[str, Any] = {"epochs": 1, "held_out": 0.4}
REFINED: dict[str, Any] = {"ARMORModifier": ARMOR, "BlockRefineModifier": TRAINED}


class Stop:
    """An observer that interrupts as an event comes that the test chooses; it keeps what was told."""

    def __init__(self, wanted: Callable[[Event], bool]) -> None:
        self.wanted = wanted
        self.told: list[str] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, PhaseStarted):
            self.told.append(event.name)
        if self.wanted(event):
            raise KeyboardInterrupt


def second_layer(event: Event) -> bool:
    return isinstance(event, LayerStarted) and event.index == 1


def never(event: Event) -> bool:
    return False


def stopped(folder: Path, model: Path, wanted: Callable[[Event], bool] = second_layer, **modifiers: Any) -> Path:
    """The journal of a run that was interrupted, by default as the second layer begins."""
    with pytest.raises(KeyboardInterrupt):
        apply(recipe(model, folder / "out", **(modifiers or REFINED)), observer=Stop(wanted))
    return folder / JOURNAL


@pytest.fixture(scope="module")
def wanted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The tensors of the undisturbed run."""
    folder = tmp_path_factory.mktemp("undisturbed")
    apply(recipe(llama, folder / "out", **REFINED))
    return tensor_hashes(folder / "out")


def test_what_was_done_is_not_done_again(llama: Path, tmp_path: Path, wanted: dict[str, str]) -> None:
    stopped(tmp_path, llama)
    seen = Stop(never)
    layers: list[int] = []

    def observe(event: Event) -> None:
        seen(event)
        layers.extend([event.index] if isinstance(event, LayerStarted) else [])

    result = apply(recipe(llama, tmp_path / "out", **REFINED), observer=observe)
    assert layers == [1]  # the first is taken from the journal, and its activations, too
    assert f"going on with {tmp_path / JOURNAL}: 2 steps are done" in seen.told
    assert result.report["resumed"] == {"steps": 2, "notes": []}
    assert tensor_hashes(tmp_path / "out") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_journal_of_another_run_is_refused_with_all_that_differs(llama: Path, tmp_path: Path) -> None:
    folder = stopped(tmp_path, llama)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = recipe(llama, tmp_path / "out", ARMORModifier={**ARMOR, "seed": 1})
    other["calibration"]["seed"] = 1
    with pytest.raises(RecipeError) as raised:
        apply(other)
    first, *lines, last = str(raised.value).splitlines()
    assert first == f"{folder} is the journal of another run:"
    assert [line.split(":")[0].strip() for line in lines if "tokens of" not in line] == ["recipe", "plan"]
    assert sum("tokens of" in line for line in lines) == 2  # of those there, and of those now
    assert last == "pass --fresh to start over, which removes it"
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert "resumed" not in apply(other, fresh=True).report
    assert not folder.exists()


@pytest.mark.parametrize("name", ["version of torch", "machine.level", "model"])
def test_another_torch_machine_or_model_is_refused(llama: Path, tmp_path: Path, name: str) -> None:
    folder = stopped(tmp_path, llama)
    records = [dict(record) for record in read_records(folder)[0]]
    was, records[0]["of"] = records[0]["of"][name], {**records[0]["of"], name: "another"}
    (folder / files.RECORDS_FILE).unlink()
    forged = JournalFiles(folder)
    for record in records:
        forged.append(record)
    with pytest.raises(RecipeError, match="is the journal of another run") as raised:
        apply(recipe(llama, tmp_path / "out", **REFINED))
    assert str(raised.value).splitlines()[1:-1] == [f"  {name}: another there, {was} now"]


def test_a_model_in_memory_has_no_journal_and_takes_none(llama: Path, tmp_path: Path) -> None:
    folder = stopped(tmp_path, llama)
    with pytest.raises(RecipeError, match="is the journal of another run, and one of a model in memory"):
        apply(recipe(llama, tmp_path / "out", **REFINED), make_model())
    apply(recipe(llama, tmp_path / "out", **REFINED), make_model(), fresh=True)
    assert not folder.exists()


def test_a_run_that_did_nothing_leaves_no_journal(llama: Path, tmp_path: Path) -> None:
    stopped(tmp_path, llama, lambda event: isinstance(event, LayerStarted))
    assert list(tmp_path.iterdir()) == []


def test_a_training_goes_on_from_its_snapshot(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, str]
) -> None:
    monkeypatch.setattr(journal, "SNAPSHOT_SECONDS", 0.0)
    folder = stopped(tmp_path, llama, lambda event: isinstance(event, UnitRefined))
    kinds = [record["kind"] for record in read_records(folder)[0]]
    assert kinds[:2] == ["run", "step"]
    assert set(kinds[2:]) == {"training"}
    found = status(tmp_path / "out")
    assert found.training is not None
    assert found.training["step"] == "prune_stage.armor_modifiers.BlockRefineModifier/model.layers.0"
    saved: list[str] = []
    write = JournalFiles.write
    monkeypatch.setattr(
        JournalFiles, "write", lambda self, name, save: (saved.append(name), write(self, name, save))[1]
    )
    apply(recipe(llama, tmp_path / "out", **REFINED))
    assert tensor_hashes(tmp_path / "out") == wanted
    per_layer = len(kinds) - 2
    assert sum(name.startswith("training") for name in saved) == per_layer  # of the second layer alone


@pytest.fixture
def left(llama: Path, tmp_path: Path) -> dict[str, Any]:
    """The recipe of a run that put its output in place, and whose journal is still there."""
    mapping = recipe(llama, tmp_path / "out", **REFINED)
    mapping["evaluation"] = {"fidelity": {"dataset": "builtin:random-tokens", "samples": 3, "sequence_length": 12}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FileJournal, "remove", lambda self: None)
        apply(mapping)
    assert status(tmp_path / "out").state == "finished"
    return mapping


def test_what_a_run_before_put_in_place_is_taken_as_it_is(
    left: dict[str, Any], tmp_path: Path, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = json.loads((tmp_path / "out/report.json").read_text())
    monkeypatch.setattr(Fidelity, "after", pytest.fail)  # nothing is measured again
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=16_300_000))  # nor written
    seen = Stop(never)
    result = apply(left, observer=seen)
    assert seen.told[-1].startswith(f"{tmp_path / 'out'} is complete: ")
    assert result.report == report
    assert len(result.modules) == 14
    assert [one.name for one in result.evaluations] == ["fidelity"]
    assert tensor_hashes(tmp_path / "out") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_is_not_what_was_put_in_place_is_not_taken_for_it(left: dict[str, Any], tmp_path: Path) -> None:
    other = {**left, "prune_stage": {"armor_modifiers": {"ARMORModifier": ARMOR}}}
    with pytest.raises(RecipeError, match="is the journal of another run"):
        apply(other)
    with pytest.raises(RecipeError, match="pass --overwrite"):
        apply(left, fresh=True)


@pytest.mark.parametrize("name", ["config.json", "report.json", "model.safetensors", "armor_manifest.json"])
@pytest.mark.parametrize("content", [b"", None])
def test_a_damaged_output_is_not_taken_for_a_complete_one(
    left: dict[str, Any], tmp_path: Path, wanted: dict[str, str], name: str, content: bytes | None
) -> None:
    file = tmp_path / "out" / name
    file.unlink() if content is None else file.write_bytes(content)
    with pytest.raises(RecipeError, match="pass --overwrite"):
        apply(left)
    shutil.rmtree(tmp_path / "out")  # with --overwrite, too, only a folder of ours is replaced
    apply(left)
    assert tensor_hashes(tmp_path / "out") == wanted
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def refusal(mapping: dict[str, Any]) -> str:
    """What a run is refused with; nothing where it is not."""
    try:
        apply(mapping, overwrite=True)
    except ArmorError as error:
        return str(error)
    return ""


@pytest.fixture(scope="module")
def whole(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, bytes]]:
    """A folder with a journal of the first layer, and the journal's files."""
    folder = tmp_path_factory.mktemp("stopped")
    found = stopped(folder, llama)
    return folder, {path.name: path.read_bytes() for path in found.iterdir()}


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_journal_is_used_as_far_as_it_is_whole(
    data: st.DataObject, whole: tuple[Path, dict[str, bytes]], llama: Path, wanted: dict[str, str]
) -> None:
    """Cut, changed or gone, at any byte of any file: the bytes of the undisturbed run, or an error of ours."""
    folder, contents = whole
    journal_folder = folder / JOURNAL
    journal_folder.mkdir(exist_ok=True)
    for file in journal_folder.iterdir():
        file.unlink()
    for name, content in contents.items():
        (journal_folder / name).write_bytes(content)
    name = data.draw(st.sampled_from(sorted(contents)))
    content, place = contents[name], data.draw(st.integers(0, len(contents[name]) - 1))
    match data.draw(st.sampled_from(["cut", "changed", "gone"])):
        case "cut":
            (journal_folder / name).write_bytes(content[:place])
        case "changed":
            (journal_folder / name).write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        case "gone":
            (journal_folder / name).unlink()
    said = refusal(recipe(llama, folder / "out", **REFINED))
    if said:
        assert "--fresh" in said
        apply(recipe(llama, folder / "out", **REFINED), overwrite=True, fresh=True)
    assert tensor_hashes(folder / "out") == wanted
    assert not journal_folder.exists()


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(content=st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_records_of_anything_else_are_none(content: bytes, tmp_path: Path) -> None:
    (tmp_path / files.RECORDS_FILE).write_bytes(content)
    assert read_records(tmp_path)[:2] == ([], 0)


def test_a_disk_that_fills_keeps_the_journal_so_far(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, str]
) -> None:
    """At each write of the journal in turn: exit code 7, and the next run goes on."""
    write, left = JournalFiles.write, iter(())

    def fail(self: JournalFiles, name: str, save: Callable[[Path], None]) -> dict[str, str]:
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        return write(self, name, save)

    monkeypatch.setattr(JournalFiles, "write", fail)
    for count in (0, 1, 2, 1):
        left = iter(range(count))
        with pytest.raises(ResourceError, match="no space left") as raised:
            apply(recipe(llama, tmp_path / "out", **REFINED))
        assert raised.value.exit_code == 7
        assert (tmp_path / JOURNAL).exists() == ("the same command goes on" in str(raised.value))
    monkeypatch.undo()
    assert apply(recipe(llama, tmp_path / "out", **REFINED)).report["resumed"]["steps"] == 3
    assert tensor_hashes(tmp_path / "out") == wanted


def tensor_bytes(folder: Path) -> int:
    """Of the files of a journal without their headers."""
    files = [file.read_bytes() for file in folder.glob("*.safetensors")]
    return sum(len(content) - 8 - int.from_bytes(content[:8], "little") for content in files)


LARGE: dict[str, dict[str, Any]] = {
    "refined": {
        "ARMORModifier": {**ARMOR, "gradient_power": 0.5, "propagate": "matched"},
        "BlockRefineModifier": TRAINED,
    },
    "distilled": {"ARMORModifier": ARMOR, "DistillationModifier": {**TRAINED, "core": True}},
    "quantised": {
        "ChannelPermutationModifier": {"targets": [r"re:.*down_proj$"]},
        "ARMORModifier": ARMOR,
        "QuantizationModifier": core(),
    },
    "dense": {"MagnitudeModifier": {"targets": [ATTENTION]}, "SparseGPTModifier": {"targets": [MLP], "pattern": "2:4"}},
}


@pytest.mark.parametrize(
    ("name", "output"),
    [*((name, "compressed-tensors") for name in LARGE), *((name, "dense") for name in LARGE if name != "quantised")],
)
def test_the_room_for_a_journal_is_enough_and_not_far_too_much(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, output: str
) -> None:
    monkeypatch.setattr(journal, "SNAPSHOT_SECONDS", 0.0)
    mapping = recipe(llama, tmp_path / "out", **LARGE[name])
    mapping["output"]["format"] = output
    mapping["calibration"] |= {"samples": 24, "sequence_length": 30}
    promised, largest = journal_bytes(make_job(mapping), tmp_path / "out"), [0]
    write = JournalFiles.write

    def watched(self: JournalFiles, *args: Any) -> dict[str, str]:
        done = write(self, *args)
        largest[0] = max(largest[0], tensor_bytes(self.folder))
        return done

    monkeypatch.setattr(JournalFiles, "write", watched)
    apply(mapping)
    assert largest[0] <= promised <= 4 * largest[0]


def test_room_for_the_journal_is_asked_for_before_anything_long(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapping = recipe(llama, tmp_path / "out", **REFINED)
    mapping["calibration"] |= {"samples": 10_000, "sequence_length": 60}
    room = journal_bytes(make_job(mapping), tmp_path / "out")
    assert 4 * 32 * 10_000 * 60 * 4 < room < 4 * 32 * 10_000 * 60 * 4 * 1.1  # two streams, twice
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=room))
    with pytest.raises(ResourceError, match=r"up to 0\.3\d* GB are the journal's") as raised:
        apply(mapping)
    assert raised.value.exit_code == 7
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "moment", [2, 5, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4, 6, 7, 8, 9, 10))]
)
def test_a_disk_that_is_full_indeed(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, str], moment: int
) -> None:
    """It fills before a file or a record is written, the so-many-th of them, and is emptied again."""
    moments = iter(range(1, moment))

    def filled(act: Callable[..., Any]) -> Callable[..., Any]:
        def late(*args: Any) -> Any:
            if next(moments, None) is None:
                fill(disk)
            return act(*args)

        return late

    with mounted(tmp_path / "disk", 48) as disk:
        for name in ("write", "append"):
            monkeypatch.setattr(JournalFiles, name, filled(getattr(JournalFiles, name)))
        with pytest.raises(ResourceError, match="no space left"):
            apply(recipe(llama, disk / "out", **REFINED))
        monkeypatch.undo()
        (disk / "ballast").unlink()
        recorded = sum(record["kind"] == "step" for record in read_records(disk / JOURNAL)[0])
        report = apply(recipe(llama, disk / "out", **REFINED)).report
        assert report.get("resumed", {"steps": 0})["steps"] == recorded
        assert tensor_hashes(disk / "out") == wanted


def test_status_of_runs(llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(InputError, match="no run is writing there"):
        status(out)
    stopped(tmp_path, llama)
    found = status(out)
    assert (found.state, found.steps, found.stage, found.training) == ("stopped", 2, "prune_stage", None)
    assert 0 < found.share < 1
    with locked(out):
        assert (status(out).state, status(out).process) == ("running", os.getpid())
    apply(recipe(llama, out, **REFINED))
    assert status(out).state == "finished"
    for text in ("", "{}"):
        (out / "armor_manifest.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"armor_manifest\.json"):
            status(out)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    record=st.dictionaries(
        st.sampled_from(["kind", "time", "share", "step", "stage", "name", "state"]),
        st.sampled_from(["step", "training", "evaluation", {}, [], 1e300, None, {"step": 1}]),
    )
)
def test_status_of_strange_records(record: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / JOURNAL
    folder.mkdir(exist_ok=True)
    (folder / files.RECORDS_FILE).unlink(missing_ok=True)
    JournalFiles(folder).append(record)
    assert json.dumps(status(tmp_path / "out").state) == '"stopped"'
