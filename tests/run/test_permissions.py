"""Whoever may read new files of the user may read all that is written, tensors as well."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from armor_recipes.events import Event
from armor_recipes.run import apply
from tests.cli.conftest import shell
from tests.support.commands import Shell, write_recipe

__all__ = ["shell"]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="permissions are POSIX's")


@pytest.fixture
def mask() -> Iterator[int]:
    mask = 0o027
    before = os.umask(mask)
    yield mask
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    found = {
        file.relative_to(folder).as_posix(): stat.S_IMODE(file.stat().st_mode)
        for file in folder.rglob("*")
        if file.is_file()
    }
    assert found
    return found


def test_a_run_and_what_is_made_of_its_output(shell: Shell, llama: Path, mask: int, tmp_path: Path) -> None:
    file = write_recipe(tmp_path, llama)
    for command in (
        ("armor", "lock", file),
        ("armor-apply", file, "--report", "report.json", "--quiet"),
        ("armor", "export", "out", "dense", "--to", "dense"),
    ):
        done = shell(*command)
        assert done.code == 0, done.err
    found = modes(tmp_path)
    assert {"out/model.safetensors", "dense/model.safetensors", "report.json"} < found.keys()
    assert set(found.values()) == {0o666 & ~mask}, found


def test_a_journal(llama: Path, mask: int, tmp_path: Path) -> None:
    seen: dict[str, int] = {}

    def look(event: Event) -> None:
        for folder in tmp_path.glob(".out.journal*"):
            seen.update(modes(folder))

    apply(write_recipe(tmp_path, llama), output=tmp_path / "out", observer=look)
    assert any(name.endswith(".safetensors") for name in seen)
    assert set(seen.values()) == {0o666 & ~mask}, seen


def test_tensors_carried_over_and_shards(llama: Path, mask: int, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    from armor_recipes.checkpoint.files import read_config
    from armor_recipes.checkpoint.stored import StoredTensors
    from armor_recipes.checkpoint.writer import carry_over, write_checkpoint

    model = AutoModelForCausalLM.from_pretrained(llama)
    (tmp_path / "more").mkdir()
    tensors = load_file(llama / "model.safetensors")
    save_file({"extra": next(iter(tensors.values())).clone()}, tmp_path / "more" / "model.safetensors")
    (tmp_path / "out").mkdir()
    write_checkpoint(
        model, {}, tmp_path / "out", dtype=model.dtype, base_config=read_config(llama), max_shard_bytes=50_000
    )
    carry_over(tmp_path / "out", StoredTensors(tmp_path / "more"), ["extra"])
    found = modes(tmp_path / "out")
    assert sum(name.endswith(".safetensors") for name in found) > 1
    assert set(found.values()) == {0o666 & ~mask}, found
