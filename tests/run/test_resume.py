"""A run that is killed goes on from its journal, and ends with the bytes of the undisturbed one."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import MixtralConfig, MixtralForCausalLM

from armor_recipes.checkpoint.journal import read_records
from tests.support.engine import ALL, ARMOR, MLP, core, recipe
from tests.support.forks import Forks
from tests.support.killing import Disk, Kill, hashes, run_killed
from tests.support.stacks import TEXT, make_stacked

EVERY = {**ARMOR, "targets": "preset:all-linear"}
SMALL = {"epochs": 2, "held_out": 0.4, "accumulate": 1}
RECIPES: dict[str, dict[str, Any]] = {
    "refined": {
        "ChannelPermutationModifier": {"targets": [r"re:.*down_proj$"]},
        "ARMORModifier": {**ARMOR, "gradient_power": 0.5},
        "BlockRefineModifier": {**SMALL, "optimizer": "muon"},
        "QuantizationModifier": core(targets=[MLP]),
    },
    "distilled": {
        "ARMORModifier": {**ARMOR, "propagate": "matched", "shrinkage": 0.1, "share_input_factor": True},
        "DistillationModifier": {**SMALL, "core": True},
    },
    "stacks": {"ARMORModifier": {**EVERY, "propagate": "matched"}, "BlockRefineModifier": SMALL},
    "experts": {"ARMORModifier": {**EVERY, "gradient_power": 0.5}, "BlockRefineModifier": SMALL},
    "passes": {
        "ARMORModifier@dense": {**ARMOR, "targets": [r"re:.*(query|ffn)$"], "propagate": "dense"},
        "ARMORModifier": {**ARMOR, "targets": [r"re:.*(key|value|dense|ffn_output)$"]},
    },
    "shared": {"ARMORModifier": {**EVERY, "unfit": "skip"}},
    "smoothed": {"SmoothQuantModifier": {}, "ARMORModifier": ARMOR, "QuantizationModifier": core(targets=[MLP])},
    "scaled": {"AWQModifier": {"n_grid": 4}, "QuantizationModifier": core(4, 16, targets=[ALL])},
    "budget": {
        "ARMORModifier": {**EVERY, "block_size": {"budget": 0.9, "windows": 3}, "gradient_power": 0.5},
        "DistillationModifier": SMALL,
    },
}
#: Models of other kinds than Llama: an encoder with a decoder, experts, and two that only passes of the whole model can be run by.
OF = {"stacks": "t5", "experts": "mixtral", "passes": "albert", "shared": "zamba2"}
OTHERS = (*OF, "smoothed", "scaled", "budget")


def mixture() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(**TEXT, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2))


def write(folder: Path, model: Path, name: str) -> Path:
    """A recipe with a measure that keeps files, whose output is `out` beside it."""
    mapping: dict[str, Any] = recipe(model, folder / "out", **RECIPES[name])
    data = "builtin:random-inputs" if name in ("stacks", "passes") else "builtin:random-tokens"
    mapping["calibration"]["dataset"] = data
    mapping["evaluation"] = {"fidelity": {"dataset": data, "samples": 3, "sequence_length": 12}}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(mapping, sort_keys=False))
    return file


class Runs:
    """Undisturbed runs of each recipe, made once."""

    def __init__(self, forks: Forks, folder: Path, model: Path) -> None:
        self.forks, self.folder, self.llama = forks, folder, model
        self.known: dict[str, tuple[Mapping[str, str], int]] = {}

    def model(self, name: str) -> Path:
        """The model of a recipe, saved once."""
        kind = OF.get(name)
        folder = self.llama if kind is None else self.folder / f"{kind}-model"
        if not folder.exists():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                made: Any = mixture() if kind == "mixtral" else make_stacked(str(kind))
            made.bfloat16().save_pretrained(folder)
        return folder

    def undisturbed(self, name: str) -> tuple[Mapping[str, str], int]:
        """Hashes of its files, and how often it flushed."""
        if name not in self.known:
            folder = self.folder / name
            folder.mkdir()
            done, flushes = run_killed(self.forks, folder, write(folder, self.model(name), name), "--quiet")
            assert done.code == 0, done.err
            assert sorted(path.name for path in folder.iterdir()) == ["out", "recipe.yaml"]
            self.known[name] = hashes(folder / "out"), flushes
        return self.known[name]

    def killed(self, folder: Path, name: str, *kills: Kill, share: Callable[[], float] | None = None) -> str:
        """Kill it at each of the moments in turn, go on, and compare; how far it was when it was killed last.

        With `share` the machine loses its power at these moments, and that of what was not flushed is left.
        """
        wanted, _ = self.undisturbed(name)
        file = write(folder, self.model(name), name)
        moment = "nothing"
        for kill in kills:
            disk = Disk(folder, folder.with_name(f"{folder.name}-disk")) if share else None
            done, _ = run_killed(self.forks, folder, file, "--quiet", "--overwrite", kill=kill, disk=disk)
            assert done.code in (-9, 0), done.err
            if disk and share:
                disk.lose(share)
            moment = reached(folder) if done.code else "ended"
        done, _ = run_killed(self.forks, folder, file, "--quiet", "--overwrite")
        assert done.code == 0, done.err
        found = hashes(folder / "out")
        assert {n for n in wanted if wanted[n] != found.get(n)} <= {"README.md", "recipe.yaml"}  # they name the output
        assert found.keys() == wanted.keys()
        assert not [path for path in folder.iterdir() if path.name.startswith(".out.journal")]
        return moment


def reached(folder: Path) -> str:
    """The kind of the journal's last record, or where the run was else."""
    journal = folder / ".out.journal"
    if not (journal / "records.jsonl").exists():
        return "no journal"
    records, _, _ = read_records(journal)  # the last line may be cut
    staged = any(path.name.startswith(".out.tmp-") for path in folder.iterdir())
    return "checkpoint" if staged and len(records) > 3 else records[-1]["kind"] if records else "no record"


@pytest.fixture(scope="session")
def runs(forks: Forks, tmp_path_factory: pytest.TempPathFactory, llama: Path) -> Runs:
    return Runs(forks, tmp_path_factory.mktemp("undisturbed"), llama)


@pytest.mark.parametrize(
    ("name", "share"),
    [
        *((name, share) for name in ("refined", "distilled") for share in (0.3, 0.6, 0.9)),
        *((name, 0.6) for name in OTHERS),
        *(pytest.param(name, share, marks=pytest.mark.slow) for name in OTHERS for share in (0.3, 0.8)),
    ],
)
def test_a_killed_run_ends_with_the_same_bytes(name: str, share: float, runs: Runs, tmp_path: Path) -> None:
    _, flushes = runs.undisturbed(name)
    runs.killed(tmp_path, name, Kill(round(share * flushes), -1.0))


def test_a_run_that_is_killed_as_it_measures(runs: Runs, tmp_path: Path) -> None:
    """The sizes of a budget: as what they cost is measured, and once that is kept, and before and after the plan is noted."""
    runs.killed(tmp_path, "budget", Kill(6, 0.02), Kill(6, 0.1), Kill(2, -1.0), Kill(2))


def test_a_run_that_is_killed_again_and_again(runs: Runs, tmp_path: Path) -> None:
    """Each time it comes a little further."""
    runs.killed(tmp_path, "distilled", *[Kill(12)] * 6)


def test_a_run_that_is_killed_once_all_is_in_place(runs: Runs, tmp_path: Path) -> None:
    """Between the last rename and the removal of the journal: the output is taken as it is, without --overwrite."""
    wanted, flushes = runs.undisturbed("refined")
    file = write(tmp_path, runs.model("refined"), "refined")
    done, _ = run_killed(runs.forks, tmp_path, file, "--quiet", kill=Kill(flushes))
    assert done.code == -9
    assert reached(tmp_path) == "written"
    there = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    done, _ = run_killed(runs.forks, tmp_path, file)
    assert done.code == 0, done.err
    said = f"{tmp_path / 'out'} is complete: the run that wrote it was cut short before its journal was removed"
    assert said in "".join(done.err.split("\n"))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == there
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.yaml"]
    found = hashes(tmp_path / "out")
    assert {n for n in wanted if wanted[n] != found[n]} <= {"README.md", "recipe.yaml"}
    assert "mean relative loss" in done.out


@pytest.mark.parametrize("lost", ["all", "some"])
@pytest.mark.parametrize(("name", "at"), [("refined", 0.5), ("distilled", 0.7), ("distilled", 0.97)])
def test_a_machine_that_loses_what_was_not_flushed(name: str, at: float, lost: str, runs: Runs, tmp_path: Path) -> None:
    """Its power goes twice; some of what was not flushed is there nevertheless, names without what they name, say."""
    _, flushes = runs.undisturbed(name)
    (folder := tmp_path / "run").mkdir()
    choose = random.Random(0)
    share = (lambda: 0.0) if lost == "all" else lambda: choose.choice([0.0, choose.random(), 1.0, 1.0])
    kills = Kill(round(at * flushes), 0.005), Kill(2, 0.02)
    runs.killed(folder, name, *kills, share=share)


@pytest.mark.endurance
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("loses", [False, True], ids=["killed", "without power"])
def test_100_moments(runs: Runs, tmp_path: Path, loses: bool) -> None:
    """Before a flush, after one, or some time after one, all by a seed; without power all, some or nothing is left of the rest."""
    choose, moments = random.Random(int(loses)), Counter[str]()
    for number in range(100):
        name = list(RECIPES)[number % len(RECIPES)]
        _, flushes = runs.undisturbed(name)
        kill = Kill(choose.randint(1, flushes), choose.choice([-1.0, 0.0, choose.uniform(0.001, 0.1)]))
        kept = choose.choice([(0.0,), (0.0, 0.5, 1.0), (0.0, 1.0), (1.0,)]) if loses else ()
        folder = tmp_path / str(number)
        folder.mkdir()
        moments[runs.killed(folder, name, kill, share=partial(choose.choice, kept) if kept else None)] += 1
    print(*(f"{count:4d}  {moment}" for moment, count in moments.most_common()), sep="\n")
    within = sum(count for moment, count in moments.items() if moment not in ("no journal", "no record", "ended"))
    assert within >= 60, moments
