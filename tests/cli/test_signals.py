"""Real signals to a real process in the middle of a solve."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from armor_recipes.checkpoint.writer import tensor_hashes
from armor_recipes.integrations.transformers import load
from armor_recipes.run import apply
from tests.support.commands import finished, forked, write_recipe
from tests.support.engine import ARMOR
from tests.support.forks import Fork, Forks


def wait_for_a_solve(running: Fork) -> None:
    """Until the first layer is done, so that the second is being solved."""
    for line in running.stderr:
        if "layer 1/" in line:
            return
    raise AssertionError("the run ended before a layer was solved")


SHORT = {**ARMOR, "iterations": 2, "targets": [r"re:.*layers\.0\..*q_proj$"]}
LONG = {**ARMOR, "iterations": 10**7, "targets": [r"re:.*layers\.1\..*q_proj$"], "solver": "adam"}


@pytest.mark.parametrize(
    ("number", "code", "old"),
    [
        (signal.SIGINT, 130, True),
        (signal.SIGTERM, 143, False),
        (signal.SIGHUP, 129, False),
        pytest.param(signal.SIGINT, 130, False, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 143, True, marks=pytest.mark.slow),
    ],
)
def test_a_signal_leaves_the_old_checkpoint_or_none(
    llama: Path, tmp_path: Path, forks: Forks, number: signal.Signals, code: int, old: bool
) -> None:
    if old:
        apply(write_recipe(tmp_path, llama))
    before = tensor_hashes(tmp_path / "out") if old else None
    file = write_recipe(tmp_path, llama, ARMORModifier=SHORT, ARMORModifier__long=LONG)
    running = forked(forks, "armor-apply", file, *(["--overwrite"] if old else []), cwd=tmp_path)
    wait_for_a_solve(running)
    running.send_signal(number)
    running.send_signal(number)  # an impatient one, which must not cut the cleaning up short
    done = finished(running)
    assert (done.code, "Traceback" in done.err) == (code, False)
    assert f"what was done is kept in {tmp_path / '.out.journal'}: the same command goes on from there" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".out.journal",
        *(["out"] if old else []),
        "recipe.yaml",
    ]
    if old:
        assert tensor_hashes(tmp_path / "out") == before
        load(tmp_path / "out")
