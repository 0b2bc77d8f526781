"""The corpus of recipes where llm-compressor is installed: what runs, each on its architecture, and what is told of the rest."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from armor_recipes import apply
from armor_recipes.errors import PlanError, RecipeError
from armor_recipes.integrations.oneshot import child, step
from armor_recipes.modifiers import config_types, modifiers
from armor_recipes.recipe import convert_recipe
from tests.support.corpus import CORPUS, PLAIN, dataset_for, save_tiny

pytestmark = pytest.mark.llmcompressor
#: What is refused, by what it is told: names of older releases, and what no loader of transformers reads.
REFUSED = (
    "llm-compressor has renamed vLLMQuantizationModifier",
    "percdamp: GPTQModifier here has no such field; llm-compressor has renamed it",
    "offload_hessians: GPTQModifier here has no such field; it moved Hessians",
    "sequential_targets: GPTQModifier here has no such field; which layers",
    "which adds rotations that are made as the model runs",
)
#: What llm-compressor 0.14.0.1 itself fails at.
THEIRS = ("AutoRoundModifier only supports channel-wise and tensor-wise",)
#: What is not here yet. Its AWQ moves tensors to pinned memory, which there is none of without an accelerator.
MISSING = {
    "kv_cache_scheme is not done here yet": "kv_cache_scheme",
    "Cannot access accelerator device when none is available": "AWQModifier",
}


@pytest.fixture(autouse=True)
def inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process is this one, which has imported llm-compressor already, and compiles nothing."""

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        child.main(Path(command[-1]))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(step, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(torch, "compile", lambda function=None, **_: function if function is not None else _same)


def _same(function: Any) -> Any:
    return function


def test_recipes_of_the_corpus_run_or_are_told_why_not(tmp_path: Path) -> None:
    """The run itself holds each folder against the model in memory."""
    models: dict[str, Path] = {}
    told: dict[int, str] = {}
    for number, item in enumerate(CORPUS):
        name, folder = item.get("model", PLAIN), tmp_path / str(number)
        if name not in models:
            models[name] = save_tiny(name, tmp_path / name)
        folder.mkdir()
        try:
            apply(
                [_readable(item, folder)],
                models[name],
                overrides=[f"calibration={{dataset: {dataset_for(name)}, samples: 4, sequence_length: 32}}"],
                output=folder / "out",
            )
        except (RecipeError, PlanError, RuntimeError, ValueError) as error:
            told[number] = str(error)
        shutil.rmtree(folder)
    missing = {text: word for text, word in MISSING.items() if word not in modifiers()}
    known = re.compile("|".join(map(re.escape, (*REFUSED, *THEIRS, *missing))))
    assert {number: text for number, text in told.items() if not known.search(text)} == {}
    # All but those, which are seven names of older releases and rotations, and one that llm-compressor fails at itself.
    lacking = [text for text in told.values() if any(one in text for one in MISSING)]
    assert len(told) - len(lacking) <= 8


def _readable(item: dict[str, str], folder: Path) -> Path:
    """The recipe's file; Python goes through `armor convert`."""
    path = folder / f"recipe.{item['form']}"
    path.write_text(item["text"], encoding="utf-8")
    if item["form"] != "py":
        return path
    converted = folder / "converted.yaml"
    converted.write_text(convert_recipe(path, registry=config_types()).yaml, encoding="utf-8")
    return converted
