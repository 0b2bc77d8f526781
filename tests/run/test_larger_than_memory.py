"""`model.memory`: weights, activations and results in mapped files, to the same bytes."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import modeling_utils

from armor_recipes.checkpoint import writer
from armor_recipes.checkpoint.staging import REPORT_FILES
from armor_recipes.compute import scratch
from armor_recipes.compute.limit import limited, private_bytes
from armor_recipes.errors import PlanError, RecipeError, ResourceError
from armor_recipes.run import apply, preflight
from armor_recipes.run.job import execute
from armor_recipes.run.preflight import scratch_bytes
from tests.run.test_ranks import run_by
from tests.support.engine import ARMOR, MLP, core, make_job, make_model, recipe, save_model
from tests.support.forks import Forks

NAMED = {"recipe.yaml", "README.md", "armor_manifest.json", *REPORT_FILES}


@pytest.fixture(autouse=True)
def all_in_files(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """However small a tensor is; the list is the bytes of each that went into a file."""
    found: list[int] = []
    empty = scratch.Scratch.empty

    def counted(self: scratch.Scratch, *args: Any) -> Any:
        tensor = empty(self, *args)
        found.append(tensor.nbytes)
        return tensor

    monkeypatch.setattr(scratch, "_SMALL", 1)
    monkeypatch.setattr(scratch.Scratch, "empty", counted)
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in NAMED}


def asked(model: Path, output: Path, memory: str | None, compute: str, **fields: Any) -> dict[str, Any]:
    made = recipe(model, output, **fields)
    made["model"] = {"id": str(model), "compute_dtype": compute, **({"memory": memory} if memory else {})}
    return made


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["llama", "llama-gqa-tied"])
@pytest.mark.parametrize("form", ["compressed-tensors", "dense"])
def test_a_run_with_memory_writes_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_in_files: list[int], kind: str, compute: str, form: str
) -> None:
    monkeypatch.setattr(
        writer.write_checkpoint, "__kwdefaults__", {**writer.write_checkpoint.__kwdefaults__, "max_shard_bytes": 40_000}
    )
    model = save_model(tmp_path / "model", kind)
    written = []
    for memory in (None, "16GiB"):
        made = asked(model, tmp_path / f"out-{memory}", memory, compute)
        made["output"]["format"] = form
        assert not all_in_files
        written.append(files(apply(made).output))
    assert written[0] == written[1]
    assert sum(name.endswith(".safetensors") for name in written[0]) > 1
    assert sum(all_in_files) > sum(len(one) for name, one in written[0].items() if name.endswith(".safetensors"))
    assert not list(tmp_path.glob(".armor-scratch*"))


def test_saving_copies_nothing_that_lies_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transformers clones what shares a storage with something else: that would be the whole model."""
    clean, seen = modeling_utils.remove_tied_weights_from_state_dict, []

    def looked_at(state: dict[str, torch.Tensor], model: Any) -> dict[str, torch.Tensor]:
        before = {name: tensor.data_ptr() for name, tensor in state.items()}
        after = {name: tensor.data_ptr() for name, tensor in clean(state, model).items()}
        seen.append(before == after)
        return state

    monkeypatch.setattr(modeling_utils, "remove_tied_weights_from_state_dict", looked_at)
    apply(asked(save_model(tmp_path / "model"), tmp_path / "out", "16GiB", "auto"))
    assert set(seen) == {True}


@pytest.mark.parametrize("memory", ["4", "4 gib", "-1GiB", "0GiB", "4GiBs", "1e3GB", "nanGiB"])
def test_what_is_no_amount_of_memory_is_told(tmp_path: Path, memory: str) -> None:
    with pytest.raises(RecipeError, match=r"model\.memory.*is no amount of memory.*4GiB"):
        make_job(asked(save_model(tmp_path / "model"), tmp_path / "out", memory, "auto"))


@pytest.mark.parametrize(
    ("modifier", "fields", "reason"),
    [
        ("DistillationModifier", {}, "trains through the whole model"),
        ("QuantizationModifier", core(), "writes quantised weights"),
    ],
)
def test_what_does_not_go_with_memory_is_refused_by_name(
    tmp_path: Path, modifier: str, fields: dict[str, Any], reason: str
) -> None:
    made = asked(
        save_model(tmp_path / "model"), tmp_path / "out", "4GiB", "auto", ARMORModifier=ARMOR, **{modifier: fields}
    )
    with pytest.raises(PlanError, match=rf"model\.memory 4GiB: .*{modifier} {reason}"):
        make_job(made)


def test_a_model_in_memory_is_refused(tmp_path: Path) -> None:
    made = asked(
        save_model(tmp_path / "model"), tmp_path / "out", "4GiB", "auto", ARMORModifier={**ARMOR, "targets": [MLP]}
    )
    with pytest.raises(RecipeError, match="this one is in memory"):
        apply(made, make_model())


def test_what_would_do_is_told_of_a_run_that_trains_the_whole_model(tmp_path: Path) -> None:
    made = asked(
        save_model(tmp_path / "model"), tmp_path / "out", "4GiB", "auto", ARMORModifier=ARMOR, DistillationModifier={}
    )
    made["calibration"] |= {"batch_size": 4, "sequence_length": 32}
    told = r"leave `memory` out, and the run takes about [0-9]+MiB, or with calibration.batch_size 2 and sequence_length 32"
    with pytest.raises(PlanError, match=told):
        make_job(made)
    made["model"]["memory"] = "20MiB"
    with pytest.raises(PlanError, match=r"and no smaller batch of it fits into 20MiB"):
        make_job(made)


def test_batches_that_would_fit_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the plan, and nothing above them."""
    monkeypatch.setattr("armor_recipes.plan.memory.anonymous_bytes", lambda: 0)
    monkeypatch.setattr("armor_recipes.run.checks.private_bytes", lambda: 0)
    made = asked(save_model(tmp_path / "model"), tmp_path / "out", "1MiB", "auto")
    made["calibration"] |= {"batch_size": 64, "samples": 64, "sequence_length": 64}
    with pytest.raises(
        PlanError, match=r"or calibration.batch_size [0-9]+ and sequence_length [0-9]+, which take"
    ) as told:
        make_job(made)
    found = re.search(r"batch_size ([0-9]+) and sequence_length ([0-9]+)", str(told.value))
    assert found is not None
    batch, length = map(int, found.groups())
    made["calibration"] |= {"batch_size": batch, "sequence_length": length}
    make_job(made)
    made["calibration"] |= {"batch_size": 2 * batch} if batch > 1 or length == 64 else {"sequence_length": 2 * length}
    with pytest.raises(PlanError, match="too little"):
        make_job(made)


def test_too_little_memory_is_refused_with_what_would_do(tmp_path: Path) -> None:
    made = asked(save_model(tmp_path / "model"), tmp_path / "out", "10MiB", "auto")
    with pytest.raises(PlanError, match=r"model\.memory 10MiB is too little .*: set [0-9]+MiB or more") as told:
        make_job(made)
    found = re.search(r"set ([0-9]+)MiB", str(told.value))
    assert found is not None
    made["model"]["memory"] = f"{int(found[1]) + 64}MiB"
    make_job(made)


def test_files_that_do_not_fit_on_the_disk_are_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, all_in_files: list[int]
) -> None:
    job = make_job(asked(save_model(tmp_path / "model"), tmp_path / "out", "16GiB", "float32"))
    counted = scratch_bytes(job, 0, dict.fromkeys(job.data().tokens, 5))
    usage = shutil.disk_usage(tmp_path)
    execute(job)
    assert sum(all_in_files) >= counted >= 4 * sum(p.numel() for p in job.shapes.parameters())
    del all_in_files[:]
    needed = 16_000_000 + counted
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: usage._replace(free=needed))
    with pytest.raises(ResourceError, match=r"GB are for what lies in files within model.memory, until the run ends"):
        execute(job, overwrite=True)
    assert not all_in_files


#: Everything goes into a file, however small it is.
SMALL = """
from armor_recipes.compute import scratch
scratch._SMALL = 1
"""
#: The second step takes 16 GiB.
TAKES_MUCH = (
    SMALL
    + """
import torch
from armor_recipes.session import shared
record, steps = shared.SharedJournal.record, []

def recorded(self, *words):
    steps.append(torch.ones(2**32 if steps else 1))
    record(self, *words)

shared.SharedJournal.record = recorded
"""
)
#: There is no memory left once the first step is recorded, also for threads.
TAKES_ALL = (
    SMALL
    + """
import resource
from armor_recipes.compute import limit
from armor_recipes.session import shared
record = shared.SharedJournal.record

def recorded(self, *words):
    record(self, *words)
    resource.setrlimit(resource.RLIMIT_DATA, (limit.private_bytes(), resource.RLIM_INFINITY))

shared.SharedJournal.record = recorded
"""
)
REFINED = {
    "ChannelPermutationModifier": {"targets": [r"re:.*down_proj$"]},
    "ARMORModifier": ARMOR,
    "BlockRefineModifier": {"epochs": 2, "held_out": 0.4, "accumulate": 1},
}


class Written:
    """A recipe with `memory` and measures in a folder; what a run without `memory` makes of it."""

    def __init__(self, forks: Forks, folder: Path, modifiers: dict[str, Any]) -> None:
        self.folder, self.model, self.modifiers = folder, save_model(folder / "model"), modifiers
        (done,) = run_by(1, forks, folder, self.recipe(None), "--quiet")
        assert done.code == 0, done.err
        self.wanted = files(folder / "out")
        self.evaluations = self.measured()
        shutil.rmtree(folder / "out")

    def recipe(self, memory: str | None) -> Path:
        made = asked(self.model, self.folder / "out", memory, "float32", **self.modifiers)
        data = {"dataset": "builtin:random-tokens", "samples": 3, "sequence_length": 12}
        made["evaluation"] = {"fidelity": data}
        file = self.folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(made, sort_keys=False))
        return file

    def measured(self) -> Any:
        found = json.loads((self.folder / "out/armor_manifest.json").read_text())["evaluation"]
        assert found
        return found

    def check(self) -> None:
        assert files(self.folder / "out") == self.wanted
        assert self.measured() == self.evaluations
        assert {path.name for path in self.folder.iterdir()} == {"model", "out", "recipe.yaml"}


@pytest.mark.parametrize(
    ("modifiers", "moments"), [({"ARMORModifier": ARMOR}, (1, 2)), (REFINED, (2, 5))], ids=["mapped", "refined"]
)
def test_a_run_with_memory_that_is_killed_goes_on(
    forks: Forks, tmp_path: Path, modifiers: dict[str, Any], moments: tuple[int, int]
) -> None:
    """Measures are those of a run without, too."""
    written = Written(forks, tmp_path, modifiers)
    path = written.recipe("8GiB")
    for moment in moments:
        (done,) = run_by(1, forks, tmp_path, path, "--quiet", program=SMALL, dies={0: f"record {moment}"})
        assert done.code == -9, done.err
        assert not list(tmp_path.glob(".armor-scratch*"))
    (done,) = run_by(1, forks, tmp_path, path, "--quiet", program=SMALL)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out/report.json").read_text())["resumed"]["steps"] >= 1
    written.check()


@pytest.mark.parametrize("program", [TAKES_MUCH, TAKES_ALL], ids=["step", "threads"])
def test_a_run_that_runs_out_of_memory_goes_on_with_more(forks: Forks, tmp_path: Path, program: str) -> None:
    written = Written(forks, tmp_path, {"ARMORModifier": ARMOR})
    (done,) = run_by(1, forks, tmp_path, written.recipe("8GiB"), "--quiet", program=program)
    assert done.code == 7, done.err
    told = " ".join(done.err.split())
    assert "model.memory 8GiB ran out" in told
    assert "the same command goes on from there" in told
    (done,) = run_by(1, forks, tmp_path, written.recipe("9GiB"), "--quiet", program=SMALL)
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out/report.json").read_text())["resumed"]["steps"] == 1
    written.check()


def test_two_processes_with_memory_write_the_same_bytes(forks: Forks, tmp_path: Path) -> None:
    written = Written(forks, tmp_path, {"ARMORModifier": ARMOR})
    done = run_by(2, forks, tmp_path, written.recipe("8GiB"), "--quiet", program=SMALL)
    assert [one.code for one in done] == [0, 0], done[-1].err
    written.check()


def test_a_plan_with_memory_is_told(forks: Forks, tmp_path: Path) -> None:
    made = asked(save_model(tmp_path / "model"), tmp_path / "out", "4GiB", "auto")
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(made))
    (done,) = run_by(1, forks, tmp_path, file, "--plan")
    assert done.code == 0, done.err
    assert "memory: 4GiB" in done.out
    assert {path.name for path in tmp_path.iterdir()} == {"model", "recipe.yaml"}


def test_weights_in_files_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("armor_recipes.plan.memory.anonymous_bytes", lambda: 0)
    model = save_model(tmp_path / "model")
    with_memory, without = (make_job(asked(model, tmp_path / "out", m, "auto")) for m in ("4GiB", None))
    weights = 4 * sum(p.numel() for p in without.shapes.parameters())
    assert with_memory.estimate.peak_bytes <= without.estimate.peak_bytes - weights


def test_what_runs_out_all_the_same_is_an_error_of_its_own(tmp_path: Path) -> None:
    held = private_bytes()
    with pytest.raises(ResourceError, match=r"model\.memory 4GiB ran out"), limited(held + 2**26, "model.memory 4GiB"):
        torch.ones(2**26, dtype=torch.float32)
    assert ResourceError.exit_code == 7
    assert float(torch.ones(2**26, dtype=torch.float32)[-1]) == 1.0  # no bound any more
