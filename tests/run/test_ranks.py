"""Several processes do one run: the bytes of one process, a rank that dies, and a restart by another number of them."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from armor_recipes.compute import ranks
from armor_recipes.compute.ranks import by_cost, each, in_turn, joined, share
from armor_recipes.errors import RecipeError, ResourceError
from armor_recipes.events import ignore_events
from armor_recipes.plan import RunEstimate
from armor_recipes.report.measure import Stopwatch
from armor_recipes.run.resuming import check_alike
from tests.run.test_resume import OTHERS, RECIPES, write
from tests.support.commands import LISTEN, Done, finished, surroundings
from tests.support.forks import Forks
from tests.support.killing import hashes

#: Of recipes that are killed, those on one stack without what is measured first.
NAMES = [name for name in RECIPES if name not in OTHERS]
#: Kills this process as it comes to record a step, or a state of a training, for so many times.
PROGRAM = (
    LISTEN
    + """
import os
from armor_recipes.session import journal, shared
journal.SNAPSHOT_SECONDS = 0.0
what, left = os.environ["DIES"].split()
left = int(left)
owner = {"record": shared.SharedJournal, "record_training": journal.FileJournal}[what]
real = getattr(owner, what)

def record(self, *words):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    real(self, *words)

setattr(owner, what, record)
"""
)
MAIN = """
from armor_recipes.cli.apply import main
main()
"""


def run_by(
    count: int,
    forks: Forks,
    folder: Path,
    *words: object,
    program: str = "",
    dies: Mapping[int, str] | None = None,
) -> list[Done]:
    """Run `armor-apply WORDS` in so many processes; `dies` says what a rank is killed at, and `program` is run by each first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    started = []
    for rank in range(count):
        own = {"RANK": str(rank), "DIES": (dies or {}).get(rank, "record 0")}
        environment = {**surroundings(), **address, **own}
        started.append(forks.start(PROGRAM + program + MAIN, *words, folder=folder, environment=environment))
    return [finished(one) for one in started]


Alone = Mapping[str, Mapping[str, str]]


@pytest.fixture(scope="module")
def alone(forks: Forks, llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Alone:
    """Hashes of what one process makes of each recipe."""
    found = {}
    for name in NAMES:
        folder = tmp_path_factory.mktemp(name)
        (done,) = run_by(1, forks, folder, write(folder, llama, name), "--quiet")
        assert done.code == 0, done.err
        found[name] = hashes(folder / "out")
    return found


def differing(folder: Path, wanted: Mapping[str, str]) -> set[str]:
    """Names of the output's files that are not those."""
    found = hashes(folder / "out")
    return {name for name in {*found, *wanted} if found.get(name) != wanted.get(name)} - {"README.md", "recipe.yaml"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_bytes_do_not_depend_on_the_number_of_processes(
    name: str, count: int, forks: Forks, llama: Path, tmp_path: Path, alone: Alone
) -> None:
    done = run_by(count, forks, tmp_path, write(tmp_path, llama, name), "--json")
    assert [one.code for one in done] == [0] * count, done[-1].err
    report = json.loads(done[0].out)["report"]
    assert report["processes"] == count
    assert report["cpu_seconds"] >= sum(report["cpu_seconds_by_phase"].values()) - 0.01
    assert not any(one.out for one in done[1:])
    assert not differing(tmp_path, alone[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]


@pytest.mark.parametrize(
    ("name", "rank", "dies", "again"),
    [
        ("refined", 1, "record 2", 3),
        ("refined", 0, "record 3", 1),
        pytest.param("distilled", 0, "record_training 2", 3, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_dies_ends_the_run_and_another_number_of_processes_goes_on(
    name: str, rank: int, dies: str, again: int, forks: Forks, llama: Path, tmp_path: Path, alone: Alone
) -> None:
    file = write(tmp_path, llama, name)
    done = run_by(2, forks, tmp_path, file, "--quiet", dies={rank: dies})
    assert (done[rank].code, done[1 - rank].code) == (-9, 7), done[1 - rank].err
    assert "another process of this run has ended" in done[1 - rank].err
    kinds = [
        json.loads(line)["kind"] for line in (tmp_path / ".out.journal" / "records.jsonl").read_text().splitlines()
    ]
    assert "training" in kinds if "training" in dies else "step" in kinds
    assert not (tmp_path / "out").exists()
    done = run_by(again, forks, tmp_path, file, "--quiet")
    assert [one.code for one in done] == [0] * again, done[0].err
    steps = json.loads((tmp_path / "out" / "report.json").read_text())["resumed"]["steps"]
    assert steps == kinds.count("step") > 0
    assert not differing(tmp_path, alone[name])


def test_an_error_of_one_is_that_of_all(forks: Forks, llama: Path, tmp_path: Path) -> None:
    program = """
from armor_recipes.errors import NumericalError
from armor_recipes.modifiers.armor.modifier import ARMORModifier

def solve(self, module, *_):
    raise NumericalError(f"rank {os.environ['RANK']} cannot solve")

ARMORModifier.solve = solve
"""
    done = run_by(2, forks, tmp_path, write(tmp_path, llama, "refined"), "--quiet", program=program)
    assert [one.code for one in done] == [4, 4]
    assert all("rank 0 cannot solve" in one.err for one in done)


def test_processes_that_differ_are_refused(forks: Forks, llama: Path, tmp_path: Path) -> None:
    program = """
import sys
sys.argv += ["--set", "calibration.seed=" + os.environ["RANK"]]
"""
    done = run_by(2, forks, tmp_path, write(tmp_path, llama, "refined"), "--quiet", program=program)
    assert [one.code for one in done] == [2, 2]
    assert all("the processes of this run differ" in one.err and "recipe: " in one.err for one in done)


def test_what_takes_one_process_says_so() -> None:
    job: Any = SimpleNamespace(recipe=SimpleNamespace(steps=()), device=torch.device("cuda"))
    with pretended(0, 2), pytest.raises(RecipeError, match="--device cuda takes one process"):
        check_alike(job)
    job = SimpleNamespace(recipe=SimpleNamespace(steps=("a step",)), device=torch.device("cpu"))
    with pretended(0, 2), pytest.raises(RecipeError, match="modifiers of llm-compressor takes one process"):
        check_alike(job)


@pytest.mark.parametrize("wrong", [{"RANK": "first"}, {"MASTER_PORT": "none"}])
def test_processes_that_do_not_meet_say_so(wrong: Mapping[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    launched = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    for name, value in {**launched, **wrong}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ranks, "_MEETING", timedelta(seconds=0.5))
    with pytest.raises(ResourceError, match=r"do not find each other .*WORLD_SIZE=2"), joined():
        pass


def test_a_message_brings_tensors_as_they_lie() -> None:
    x = torch.arange(12, dtype=torch.float32).view(3, 4)
    big = torch.randn(1000, 4)
    value = {
        "transposed": x.T,
        "same": [x, x],
        "view": big[3:5],
        "gaps": big[:, :2],
        "half": x.bfloat16(),
        "mask": x > 3,
        "none": torch.empty(0, 3),
        "one": torch.tensor(2.5),
        "words": ("a", 1),
    }
    message = ranks._packed(value)
    found = ranks._unpacked(message)
    assert found["same"][0] is found["same"][1]
    assert found["words"] == ("a", 1)
    assert found["transposed"].stride() == x.T.stride()
    assert message.numel() < big.nbytes
    for name in ("transposed", "view", "gaps", "half", "mask", "none", "one"):
        assert found[name].dtype == value[name].dtype
        assert torch.equal(found[name], value[name])
        assert found[name].untyped_storage().nbytes() == value[name].numel() * value[name].element_size()


class Pretended:
    """A group in which this process has every rank's part in turn."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def gather(self, value: object) -> list[object]:
        return [value] * self.size


@contextmanager
def pretended(rank: int, size: int) -> Iterator[None]:
    """Inside, this process is one of several."""
    token = ranks._ranks.set(Pretended(rank, size))
    try:
        yield
    finally:
        ranks._ranks.reset(token)


def test_items_and_modules_are_shared_out() -> None:
    with pretended(1, 3):
        assert list(share(range(8))) == [1, 4, 7]
        assert list(in_turn(iter("abc"), 8)) == list("aaabbbcc")
        assert by_cost([1, 5, 1, 3, 3]) == [[1], [0, 3], [2, 4]]
    assert list(share(range(3))) == [0, 1, 2]
    assert by_cost([1, 2]) == [[0, 1]]
    with pytest.raises(ValueError, match="as it was"):
        each(lambda: int("as it was"))


def test_cpu_time_is_that_of_all(tmp_path: Path) -> None:
    """Of the phases that all ranks share; what only rank 0 does afterwards is its own."""
    watch = Stopwatch(ignore_events)
    watch.phase("compress")
    began = time.process_time()
    torch.ones(500, 500) @ torch.ones(500, 500)
    own = time.process_time() - began
    with pretended(0, 3):
        watch.together()
        counted = watch.cpu_seconds["compress"]
    assert counted >= 3 * own > 0
    watch.phase("save")
    report = watch.report(tmp_path, source=None, estimate=RunEstimate(0, 0.0), modules={})
    phases = report["cpu_seconds_by_phase"]
    assert phases["compress"] == pytest.approx(counted, abs=0.1)
    assert report["cpu_seconds"] >= sum(phases.values()) - 0.01


@pytest.mark.slow
def test_torchrun_starts_it(llama: Path, tmp_path: Path, alone: Alone) -> None:
    """The command of docs/cli.md."""
    file = write(tmp_path, llama, "distilled")
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "-m",
        "armor_recipes.cli",
        str(file),
        "--quiet",
    ]
    done = subprocess.run(
        words, cwd=tmp_path, env=surroundings(), capture_output=True, text=True, check=False, timeout=280
    )
    assert done.returncode == 0, done.stderr
    assert not differing(tmp_path, alone["distilled"])
