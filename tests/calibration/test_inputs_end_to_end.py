"""Recipes that calibrate on named tensors, through the whole pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import Dinov2Config, Dinov2Model

from armor_recipes import apply
from armor_recipes.errors import InputError, PlanError
from tests.support.engine import recipe, save_model
from tests.support.images import needs_processors


def calibrated(folder: Path, dataset: str, **keys: object) -> dict[str, object]:
    made = recipe(save_model(folder / "model"), folder / "out", NoWagModifier={"targets": ["re:.*mlp.*"]})
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


@needs_processors
def test_images_of_several_sizes_go_through_a_run(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    config = Dinov2Config(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)
    with torch.random.fork_rng():
        Dinov2Model(config).save_pretrained(tmp_path / "model")
    kept = {"image_processor_type": "BitImageProcessor", "do_resize": False, "do_center_crop": False}
    (tmp_path / "model/preprocessor_config.json").write_text(json.dumps(kept))
    (tmp_path / "images").mkdir()
    for i, size in enumerate([(8, 8), (12, 8), (8, 8), (12, 8), (8, 8)]):
        image.new("L", size, 40 * i).save(tmp_path / f"images/{i}.png")
    data = {"dataset": str(tmp_path / "images"), "image_column": "image", "samples": 5}
    made = {
        **recipe(tmp_path / "model", tmp_path / "out", NoWagModifier={"targets": [r"re:.*(query|fc\d)$"]}),
        "calibration": {**data, "batch_size": 2},
        "evaluation": {"fidelity": data},
    }
    result = apply(made)
    (row,) = json.loads((result.output / "armor_manifest.json").read_text())["calibration"]
    assert sorted(row["inputs"]["pixel_values"]["shapes"]) == [[3, 8, 8], [3, 8, 12]]
    assert row["sequence_length"] is None
    assert {found.tokens for found in result.modules.values()} == {3 * (1 + 4) + 2 * (1 + 6)}
    assert result.evaluations[0].after.size.startswith("5 samples")
    again = apply(made, output=tmp_path / "again")
    files = [(each.output / "model.safetensors").read_bytes() for each in (result, again)]
    assert files[0] == files[1]
