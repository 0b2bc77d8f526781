"""Recipes that calibrate on named tensors, through the whole pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from armor_recipes import apply
from armor_recipes.errors import InputError, PlanError
from tests.support.engine import recipe, save_model


def calibrated(folder: Path, dataset: str, **keys: object) -> dict[str, object]:
    made = recipe(save_model(folder / "model"), folder / "out", WandaModifier={"targets": ["re:.*mlp.*"]})
    made["calibration"] = {"dataset": dataset, "samples": 4, "sequence_length": 8, **keys}
    return made


def test_random_inputs_and_files_of_tensors_go_through_a_run(tmp_path: Path) -> None:
    result = apply(calibrated(tmp_path, "builtin:random-inputs"))
    (row,) = json.loads((result.output / "armor_manifest.json").read_text())["calibration"]
    assert (row["samples"], row["sequence_length"], row["sources"][0]["dataset"]) == (4, 8, "builtin:random-inputs")
    assert "inputs" not in row
    ids = torch.arange(40).view(5, 8)
    save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tmp_path / "x.safetensors")
    result = apply(calibrated(tmp_path, str(tmp_path / "x.safetensors")), overwrite=True)
    (row,) = json.loads((result.output / "armor_manifest.json").read_text())["calibration"]
    assert row["inputs"] == {
        "attention_mask": {"dtype": "int64", "shape": [8]},
        "input_ids": {"dtype": "int64", "shape": [8]},
    }
    assert row["sources"] == [
        {
            "dataset": "x.safetensors",
            "documents": 5,
            "empty": 0,
            "tokens": 32,
            "available": 5,
            "taken": 4,
            "stream": False,
            "short": 0,
        }
    ]


def test_what_does_not_fit_the_model_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    save_file({"input_idz": torch.zeros(4, 8, dtype=torch.int64)}, tmp_path / "x.safetensors")
    with pytest.raises(
        InputError, match=r"'input_idz', which the forward pass of LlamaForCausalLM does not take.*'input_ids'"
    ):
        apply(calibrated(tmp_path, str(tmp_path / "x.safetensors")))


def test_a_length_says_nothing_of_files_of_tensors(tmp_path: Path) -> None:
    save_file({"input_ids": torch.zeros(4, 8, dtype=torch.int64)}, tmp_path / "x.safetensors")
    apply(calibrated(tmp_path, str(tmp_path / "x.safetensors"), sequence_length=100_000))
    with pytest.raises(PlanError, match="sequence_length 100000 is longer than"):
        apply(calibrated(tmp_path, "builtin:random-inputs", sequence_length=100_000), overwrite=True)
