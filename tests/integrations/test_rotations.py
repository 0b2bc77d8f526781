"""Folders whose models rotate activations, queries and keys as they run: loaded as they were saved, or told what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.transform import TransformConfig, apply_transform_config
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import armor_recipes
from armor_recipes.checkpoint.export import Source, export
from armor_recipes.errors import CheckpointError, PlanError
from tests.support.engine import make_job, recipe, save_model
from tests.support.packed import logits

LINEARS = {"targets": ["re:.*_proj$"]}
#: As QuIP makes them: V before a weight, U after it, both taken back in the weight.
QUIP = {
    "v": {
        "type": "random-hadamard",
        "apply": [
            {**LINEARS, "location": "input", "inverse": False},
            {**LINEARS, "location": "weight_input", "inverse": True},
        ],
    },
    "u": {
        "type": "random-hadamard",
        "apply": [
            {**LINEARS, "location": "weight_output", "inverse": False},
            {**LINEARS, "location": "output", "inverse": True},
        ],
    },
}
#: SpinQuant's R4, and its R3, which cancels in the product of queries and keys.
R4 = {
    "R4": {
        "type": "hadamard",
        "apply": [
            {"targets": ["re:.*down_proj$"], "location": "input", "inverse": False},
            {"targets": ["re:.*down_proj$"], "location": "weight_input", "inverse": True},
        ],
    }
}
R3 = {
    "R3": {
        "type": "hadamard",
        "head_dim": 8,
        "apply": [{"targets": ["re:.*self_attn$"], "location": place} for place in ("q_attn", "k_cache")],
    }
}
Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


def rotated(folder: Path, groups: dict[str, Any], change: Change | None = None) -> tuple[Path, Tensor]:
    """A folder as llm-compressor writes it, and the logits of the model in memory."""
    save_model(folder, "llama-gqa-tied", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = logits(model)  # a rotation and its inverse leave the function
    apply_transform_config(model, TransformConfig.model_validate({"config_groups": groups}))
    once = {id(value): name for name, value in reversed(model.state_dict(keep_vars=True).items())}
    tensors = {
        name: value.detach() for name, value in model.state_dict(keep_vars=True).items() if once[id(value)] == name
    }
    config = json.loads((folder / "config.json").read_text())
    found = TransformConfig.model_validate({"config_groups": groups}).model_dump(mode="json")
    config["quantization_config"] = {"quant_method": "compressed-tensors", "transform_config": found}
    if change is not None:
        change(config["quantization_config"], tensors)
    save_file(
        {name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder, wanted


@pytest.mark.parametrize("groups", [QUIP, R4, R3, {**R3, **R4}], ids=["QuIP", "R4", "R3", "R3 and R4"])
def test_a_folder_loads_as_the_model_that_was_saved(tmp_path: Path, groups: dict[str, Any]) -> None:
    folder, wanted = rotated(tmp_path / "rotated", groups)
    ours, theirs = armor_recipes.load(folder), AutoModelForCausalLM.from_pretrained(folder)
    for model in (ours, theirs):
        torch.testing.assert_close(logits(model), wanted, atol=2e-5, rtol=1e-4)
    ours.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(armor_recipes.load(tmp_path / "again")), logits(ours))
    names = {name for name in load_file(folder / "model.safetensors") if name.count(".") > 4}
    assert names == {name for name in load_file(tmp_path / "again" / "model.safetensors") if name.count(".") > 4}


def test_what_rotates_makes_a_difference_and_cannot_be_left_out(tmp_path: Path) -> None:
    def forgotten(quantization: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del quantization["transform_config"]

    folder, wanted = rotated(tmp_path / "rotated", R4, forgotten)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert float((logits(AutoModelForCausalLM.from_pretrained(folder)) - wanted).norm() / wanted.norm()) > 0.01


def without(quantization: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    del tensors[next(name for name in tensors if "R4" in name)]


def smaller(quantization: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    name = next(name for name in tensors if "R4" in name)
    tensors[name] = tensors[name][:8, :8]


def unknown(quantization: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    quantization["transform_config"]["config_groups"]["R4"]["type"] = "fourier"


def nothing(quantization: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    quantization["transform_config"] = {"groups": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, r"asks for rotations whose tensors are in no file \(model.layers.0.mlp.down_proj.R4_input.weight"),
        (smaller, r"model.layers.0.mlp.down_proj.R4_input.weight is \(8, 8\), and the rotation of transform_config"),
        (unknown, "compressed-tensors cannot make the rotations of transform_config"),
        (nothing, "transform_config is none that compressed-tensors writes"),
    ],
)
def test_what_is_wrong_with_rotations_is_told(tmp_path: Path, change: Change, message: str) -> None:
    folder, _ = rotated(tmp_path / "rotated", R4, change)
    with pytest.raises(CheckpointError, match=message):
        armor_recipes.load(folder)


def test_nothing_that_would_lose_rotations_is_made(tmp_path: Path) -> None:
    folder, _ = rotated(tmp_path / "rotated", R4)
    for target in ("armor", "dense"):
        (tmp_path / target).mkdir()
        with pytest.raises(PlanError, match="rotates activations as it runs"):
            export(Source.open(folder), tmp_path / target, to=target)
    with pytest.raises(
        PlanError, match=r"has transforms \(transform_config in its config.json\), which a recipe would lose"
    ):
        make_job(recipe(folder))
