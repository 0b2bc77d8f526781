"""A run writes the same bytes on one, two and three threads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.commands import LISTEN, finished, surroundings
from tests.support.engine import core
from tests.support.forks import Forks
from tests.support.killing import hashes

PROGRAM = (
    LISTEN
    + """
import os, torch
torch.set_num_threads(int(os.environ["THREADS"]))
from armor_recipes.cli.apply import main
main()
"""
)
TARGETS = [r"re:.*layers\.[01]\..*_proj$"]
ARMOR = {"targets": TARGETS, "block_size": 32, "iterations": 2}
MATCHED = {**ARMOR, "propagate": "matched", "shrinkage": 0.1}
#: Batches of 5 · 125 tokens are large enough for torch to share them among threads, and no multiple of three vectors.
CALIBRATION = {"dataset": "builtin:pydoc", "samples": 12, "sequence_length": 125, "batch_size": 5}
RECIPES: dict[str, dict[str, Any]] = {
    "diagonal": {"ARMORModifier": ARMOR},
    "refined": {"ARMORModifier": ARMOR, "BlockRefineModifier": {"targets": TARGETS}},
    "distilled": {
        "ARMORModifier": {**ARMOR, "propagate": "dense", "gradient_power": 0.5},
        "DistillationModifier": {"targets": TARGETS},
    },
    "hessian": {"ARMORModifier": {**ARMOR, "objective": "hessian", "shrinkage": "auto"}},
    "matched": {"ARMORModifier": MATCHED, "QuantizationModifier": core(targets=TARGETS)},
    "gptq": {"GPTQModifier": {"targets": TARGETS, "scheme": "W4A16"}},
    "awq": {"AWQModifier": {}, "QuantizationModifier": {"targets": TARGETS, "scheme": "W4A16"}},
}


def write(folder: Path, name: str) -> Path:
    """A recipe of the embedded model, whose output is `out` beside it."""
    text = {"dataset": "builtin:pydoc-heldout", "sequence_length": 125, "windows": 9}
    file = folder / "recipe.yaml"
    mapping = {
        "model": "builtin:stdlib-llama",
        "calibration": CALIBRATION,
        "prune_stage": {"armor_modifiers": RECIPES[name]},
        "output": {"path": "out"},
        "evaluation": {"perplexity": text},
    }
    file.write_text(yaml.safe_dump(mapping, sort_keys=False))
    return file


@pytest.mark.parametrize(
    "name", [name if name == "diagonal" else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_bytes_do_not_depend_on_the_number_of_threads(name: str, forks: Forks, tmp_path: Path) -> None:
    found = []
    for threads in (1, 2, 3):
        folder = tmp_path / str(threads)
        folder.mkdir()
        environment = {**surroundings(), "THREADS": str(threads)}
        done = finished(forks.start(PROGRAM, write(folder, name), "--quiet", folder=folder, environment=environment))
        assert done.code == 0, done.err
        found.append(hashes(folder / "out"))
    assert "model.safetensors" in found[0]
    assert found[0] == found[1] == found[2]
