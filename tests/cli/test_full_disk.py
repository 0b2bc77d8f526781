"""A disk that fills after hours: exit code 7, the old checkpoint untouched, what was computed kept or named as lost."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from armor_recipes.checkpoint import staging
from armor_recipes.checkpoint.verify import verify
from armor_recipes.integrations.transformers import load
from armor_recipes.run import job, report_file
from tests.support.commands import Done, Shell, write_recipe
from tests.support.disks import fill, mounted
from tests.support.engine import ARMOR, save_model

FEW = {**ARMOR, "iterations": 0}
#: What the disk is full before, and what becomes of the new checkpoint.
MOMENTS: dict[str, tuple[ModuleType, str, str]] = {
    "weights": (job, "write_checkpoint", "lost"),
    "what is carried over": (job, "carry_over", "weights"),
    "companions, tokenizer and card": (job, "write_beside", "weights"),
    "manifest": (job, "build_manifest", "weights"),
    "report.json": (job, "verify_reloaded", "complete"),
    "commit": (staging, "_exchange", "complete"),
    "--report": (report_file, "_write", "in place"),
}
SAID = {
    "lost": "14 compressed modules (",
    "weights": "the weights, written in full, are kept in {out}.unverified",
    "complete": "what was written is complete and kept in {out}.unverified",
    "in place": "cannot be written (No space left on device); the checkpoint is complete in {out}, and its report.json says the",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model with a tensor of no module, which is carried over, and a licence."""
    folder = save_model(tmp_path / "m")
    file = folder / "model.safetensors"
    save_file({**load_file(file), "head.weight": torch.ones(8)}, file, metadata={"format": "pt"})
    (folder / "LICENSE").write_text("free")
    return folder


@pytest.fixture(params=MOMENTS)
def moment(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def before(monkeypatch: pytest.MonkeyPatch, moment: str, act: Callable[[], None]) -> None:
    module, name, _ = MOMENTS[moment]
    original: Callable[..., Any] = vars(module)[name]

    def late(*args: Any, **options: Any) -> Any:
        act()
        return original(*args, **options)

    monkeypatch.setattr(module, name, late)


def check(done: Done, out: Path, moment: str, old: dict[str, bytes]) -> None:
    fate = MOMENTS[moment][2]
    assert done.code == 7, done.err
    assert SAID[fate].format(out=out) in done.err.splitlines()[-1]
    assert (contents(out) == old) == (fate != "in place")
    kept = out.with_name(f"{out.name}.unverified")
    others = {path.name for path in out.parent.iterdir()} - {"ballast", "recipe.yaml", "m", "old", out.name}
    journal = set() if fate == "in place" else {f".{out.name}.journal"}
    assert others == ({kept.name} if fate in ("weights", "complete") else set()) | journal
    if kept.exists():
        load(kept)
    if fate in ("complete", "in place"):
        verify(kept if kept.exists() else out)


def test_at_every_moment(
    shell: Shell, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """As the system tells it, wherever the tests run."""
    file = write_recipe(tmp_path, model, ARMORModifier=FEW)
    assert shell("armor-apply", file, "--quiet", "--set", "prune_stage.armor_modifiers.ARMORModifier.seed=1").code == 0
    old = contents(tmp_path / "out")

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "somewhere"))

    before(monkeypatch, moment, full)
    check(shell("armor-apply", file, "--overwrite", "--report", "r.json"), tmp_path / "out", moment, old)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", 24) as place:
        yield place


def test_at_every_moment_for_real(
    shell: Shell, model: Path, tmp_path: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    file = write_recipe(tmp_path, model, ARMORModifier=FEW)
    words = ("armor-apply", file, "--output", disk / "out")
    assert shell(*words, "--quiet", "--set", "prune_stage.armor_modifiers.ARMORModifier.seed=1").code == 0
    old = contents(disk / "out")
    before(monkeypatch, moment, lambda: fill(disk))
    done = shell(*words, "--overwrite", "--report", disk / "r.json")
    if moment == "commit":  # a rename takes no room here
        assert done.code == 0
        verify(disk / "out")
    else:
        check(done, disk / "out", moment, old)


def test_a_rename_that_fails_leaves_the_folder_where_it_is(
    shell: Shell, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    monkeypatch.setattr(Path, "rename", full)
    done = shell("armor-apply", write_recipe(tmp_path, model, ARMORModifier=FEW))
    (kept,) = tmp_path.glob(".out.tmp-*")
    assert done.code == 7
    assert f"complete and kept in {kept}: move that away before the next run on {tmp_path / 'out'}" in done.err
    verify(kept)
