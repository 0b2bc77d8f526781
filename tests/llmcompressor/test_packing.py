"""Folders that llm-compressor saved: read, packed where they are 2:4, and taken as the model of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import armor_recipes
from armor_recipes.checkpoint.reader import inspect
from armor_recipes.checkpoint.verify import verify
from armor_recipes.integrations.exporting import export_folder
from tests.llmcompressor.conftest import oneshot
from tests.support.engine import MLP, recipe

pytestmark = [
    pytest.mark.llmcompressor,
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules:UserWarning"),
]
LINEAR: dict[str, Any] = {"targets": ["Linear"], "ignore": ["lm_head"]}
PRUNE = {"WandaPruningModifier": {**LINEAR, "ignore": ["re:.*lm_head"], "sparsity": 0.5, "mask_structure": "2:4"}}
SPARSE: dict[str, tuple[dict[str, Any], str]] = {
    "W4A16": ({"QuantizationModifier": {**LINEAR, "config_groups": {"a": {"targets": ["Linear"], "weights": {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 32}}}}}, "int4"),
    "W8A8": ({"QuantizationModifier": {**LINEAR, "scheme": "W8A8"}}, "int8"),
    "not quantised": ({}, "float32"),
}  # fmt: skip


def saved(model: Path, folder: Path, **modifiers: Any) -> Path:
    """What `oneshot` makes of the embedded model, saved compressed."""
    ids = torch.arange(4 * 64).view(4, 64) * 7 % 2048
    made: Any = oneshot(model, {"prune_stage": {"prune_modifiers": modifiers}}, ids)
    made.save_pretrained(folder, save_compressed=True)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(torch.arange(64).view(2, 32)).logits
    return found


@pytest.mark.parametrize("kind", SPARSE)
def test_2of4_folders_are_packed_with_equal_logits(kind: str, model: Path, tmp_path: Path) -> None:
    modifiers, core = SPARSE[kind]
    folder = saved(model, tmp_path / "theirs", **PRUNE, **modifiers)
    done = export_folder(folder, tmp_path / "ours", to="armor")
    verify(tmp_path / "ours")
    assert {layer.core for layer in inspect(tmp_path / "ours").layers} == {core}
    assert done.layers == 28
    assert [len(names) for names in done.stay.values()] in ([], [1])  # lm_head, where it is not tied
    backend = "reference" if kind == "W8A8" else "folded"
    ours = logits(armor_recipes.load(tmp_path / "ours", backend=backend, dtype=torch.float32))
    assert torch.equal(ours, logits(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)))


def test_a_quantised_folder_is_the_model_of_a_recipe(model: Path, tmp_path: Path) -> None:
    folder = saved(model, tmp_path / "theirs", **SPARSE["W4A16"][0])
    armor = {"targets": [MLP], "block_size": 8, "iterations": 2}
    result = armor_recipes.apply(recipe(folder, tmp_path / "out", ARMORModifier=armor))
    assert result.plan.notes == ("28 layers of the model are decompressed: int4, groups of 32",)
    assert len(inspect(tmp_path / "out").layers) == 12
