"""`armor_recipes.to_dense`: a loaded model becomes the dense one that it stands for, in place, and nothing claims otherwise."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import attach_align_device_hook
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import armor_recipes
from armor_recipes.errors import PlanError
from armor_recipes.runtime.linear import ArmorLinear
from tests.support.forks import Forks
from tests.support.packed import MODELS, logits, write

KIND = "llama-attention-bias-gqa"
OPTIONS: list[dict[str, Any]] = [{}, {"share": True}, {"bits": 8}, {"bits": 4, "group": 8}]


@pytest.fixture(params=OPTIONS, ids=str)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    write(KIND, tmp_path / "model", **request.param)
    return tmp_path / "model"


def armor_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, ArmorLinear)]


@pytest.mark.parametrize("load", [armor_recipes.load, AutoModelForCausalLM.from_pretrained])
def test_the_same_bits_in_plain_layers(folder: Path, load: Any) -> None:
    model: PreTrainedModel = load(folder, dtype=torch.float32)
    before = logits(model)
    assert len(armor_layers(model)) > 10
    assert armor_recipes.to_dense(model) is model
    assert armor_layers(model) == []
    assert torch.equal(logits(model), before)
    plain = {type(module) for module in model.modules() if isinstance(module, nn.Linear)}
    assert plain == {nn.Linear}
    fresh = nn.Linear(1, 1).__dict__.keys() | {"_is_hf_initialized"}
    assert model.model.layers[0].mlp.down_proj.__dict__.keys() <= fresh
    assert armor_recipes.to_dense(model) is model  # once more changes nothing


def test_it_is_an_ordinary_model(folder: Path) -> None:
    model = armor_recipes.to_dense(armor_recipes.load(folder))
    before = logits(model.half())  # which transformers refuses of a compressed model
    model = armor_recipes.to_dense(armor_recipes.load(folder))
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied.half()), before)


STOCK = """
import sys, torch
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not any(info.values()), info
assert "armor_recipes" not in sys.modules and "compressed_tensors" not in sys.modules
with torch.no_grad():
    torch.save(model((torch.arange(48) * 7 % 96).view(2, 24)).logits, sys.argv[2])
"""


@pytest.mark.parametrize("kind", [KIND, "qwen2-tied"])
def test_it_is_saved_as_a_dense_folder_that_a_stock_loader_reads(kind: str, tmp_path: Path, forks: Forks) -> None:
    write(kind, tmp_path / "model")
    model = armor_recipes.to_dense(armor_recipes.load(tmp_path / "model", dtype=torch.float32))
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    forks.run(STOCK, tmp_path / "dense", tmp_path / "logits.pt", folder=tmp_path)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), logits(model), rtol=1e-5, atol=1e-6)
    assert torch.equal(logits(armor_recipes.load(tmp_path / "dense")), logits(model))


def test_whatever_state_of_torch_the_caller_has_set(folder: Path) -> None:
    expected = armor_recipes.to_dense(armor_recipes.load(folder)).state_dict()
    model = armor_recipes.load(folder)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        armor_recipes.to_dense(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, expected[name])
        assert not tensor.is_inference()


def test_a_part_of_a_model(folder: Path) -> None:
    model = armor_recipes.load(folder, dtype=torch.float32)
    before = logits(model)
    armor_recipes.to_dense(model.model.layers[0])
    assert {name.split(".")[2] for name in armor_layers(model)} == {"1"}
    assert torch.equal(logits(model), before)


def test_models_without_our_layers_stay_as_they_are() -> None:
    model = MODELS[KIND]()
    before = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert armor_recipes.to_dense(model) is model
    assert {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()} == before


def test_offloaded_layers_are_refused_before_anything_is_changed(tmp_path: Path) -> None:
    write(KIND, tmp_path / "model")
    model = armor_recipes.load(tmp_path / "model")
    names = armor_layers(model)
    model.model.layers[1].to("meta")
    with pytest.raises(PlanError, match=r"model\.layers\.1\..* was offloaded .* `armor export FOLDER OUT --to dense`"):
        armor_recipes.to_dense(model)
    assert armor_layers(model) == names
    assert model.config.quantization_config is not None


def test_layers_that_are_compressed_otherwise_are_refused_before_anything_is_changed(tmp_path: Path) -> None:
    write(KIND, tmp_path / "model")
    model = armor_recipes.load(tmp_path / "model")
    names = armor_layers(model)
    model.lm_head.quantization_scheme = model.model.layers[0].mlp.up_proj.quantization_scheme
    with pytest.raises(PlanError, match=r"lm_head \(Linear\) is compressed, and no ARMOR layer"):
        armor_recipes.to_dense(model)
    assert armor_layers(model) == names


def test_accelerates_hooks_stay(tmp_path: Path) -> None:
    write(KIND, tmp_path / "model")
    model = armor_recipes.load(tmp_path / "model", dtype=torch.float32)
    before = logits(model)
    attach_align_device_hook(model, execution_device=torch.device("cpu"))
    armor_recipes.to_dense(model)
    assert hasattr(model.model.layers[0].mlp.up_proj, "_hf_hook")
    assert torch.equal(logits(model), before)
