"""Python blocks of the docs run, page by page, in one namespace a page and a folder of their own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

import armor_recipes
from tests.support.pages import PAGES, blocks, first_recipe

#: The blocks of how-to/modifier.md make modifiers: test_add_a_modifier.py.
PROGRAMS = [block for block in blocks("python") if block.tag is None and block.page.name != "modifier.md"]
PYTHON = [page for page in PAGES if page in {block.page for block in PROGRAMS}]


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint, for blocks that load one from `folder`."""
    recipe: Mapping[str, object] = {
        "model": str(tiny_llama),
        "calibration": {"dataset": "builtin:random-tokens", "samples": 4, "sequence_length": 16},
        "prune_stage": {
            "armor_modifiers": {"ARMORModifier": {"targets": ["re:.*_proj$"], "block_size": 8, "iterations": 3}}
        },
        "output": {"path": str(tmp_path_factory.mktemp("checkpoint") / "out")},
    }
    return armor_recipes.apply(recipe).output


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
@pytest.mark.parametrize("page", PYTHON, ids=lambda page: page.name)
def test_blocks_run(page: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "first.yaml").write_text(first_recipe(), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page", "folder": str(checkpoint)}
    for block in PROGRAMS:
        if block.page != page:
            continue
        if "from peft import" in block.text:
            pytest.importorskip("peft")
        exec(compile("\n" * block.line + block.text, str(block.page), "exec"), names)
