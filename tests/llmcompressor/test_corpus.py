"""The corpus of recipes where llm-compressor is installed: what runs, each on its architecture, and what is told of the rest."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from armor_recipes import apply
from armor_recipes.errors import RecipeError
from armor_recipes.integrations.oneshot import child, step
from armor_recipes.modifiers import config_types
from armor_recipes.recipe import convert_recipe
from tests.support.corpus import CORPUS, PLAIN, dataset_for, save_tiny

#: llm-compressor warns as it saves, and warnings are errors in tests.
pytestmark = [pytest.mark.llmcompressor, pytest.mark.filterwarnings("ignore")]
#: A word of a recipe that does not run → what is told: names of older releases, and what llm-compressor 0.14.0.1 itself fails at.
TOLD = {
    "vLLMQuantizationModifier": "llm-compressor has renamed vLLMQuantizationModifier: write QuantizationModifier",
    "percdamp": "percdamp: GPTQModifier here has no such field; llm-compressor has renamed it",
    "offload_hessians=True": "offload_hessians: GPTQModifier here has no such field; it moved Hessians",
    "sequential_targets=": "sequential_targets: GPTQModifier here has no such field; which layers",
    'AutoRoundModifier(targets="Linear", scheme="FP8_BLOCK"': "AutoRoundModifier only supports channel-wise and tensor-",
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


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny model's folder by its architecture."""
    folder = tmp_path_factory.mktemp("tiny")

    def made(name: str) -> Path:
        return folder / name if (folder / name).exists() else save_tiny(name, folder / name)

    return made


def told(item: dict[str, str]) -> str | None:
    """What a recipe that does not run is told; None for one that runs."""
    return next((text for word, text in TOLD.items() if word in item["text"]), None)


@pytest.mark.parametrize("item", CORPUS, ids=map(str, range(len(CORPUS))))
def test_recipes_of_the_corpus_run_or_are_told_why_not(
    item: dict[str, str], models: Callable[[str], Path], tmp_path: Path
) -> None:
    """A run itself holds the folder that it writes against the model in memory."""
    name, text = item.get("model", PLAIN), told(item)
    calibration = f"calibration={{dataset: {dataset_for(name)}, samples: 4, sequence_length: 32}}"

    def run() -> None:
        apply([_readable(item, tmp_path)], models(name), overrides=[calibration], output=tmp_path / "out")

    if text is None:
        run()
        assert (tmp_path / "out" / "armor_manifest.json").exists()
        shutil.rmtree(tmp_path / "out")
    else:
        with pytest.raises((RecipeError, ValueError), match=text):
            run()


def test_most_of_them_run() -> None:
    """Four of the others use words that llm-compressor 0.14 has renamed or dropped itself."""
    runs = sum(told(item) is None for item in CORPUS)
    assert (runs, len(CORPUS)) == (123, 128)
    assert runs >= 0.95 * len(CORPUS)


def _readable(item: dict[str, str], folder: Path) -> Path:
    """The recipe's file; Python goes through `armor convert`."""
    path = folder / f"recipe.{item['form']}"
    path.write_text(item["text"], encoding="utf-8")
    if item["form"] != "py":
        return path
    converted = folder / "converted.yaml"
    converted.write_text(convert_recipe(path, registry=config_types()).yaml, encoding="utf-8")
    return converted
