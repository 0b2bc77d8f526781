"""Quantised keys and values: scales against a cache that rounds by itself, from the plan to loaded folders."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import armor_recipes
from armor_recipes.calibration.tokens import build_tokens
from armor_recipes.checkpoint.reader import inspect as inspected
from armor_recipes.checkpoint.reader import read_config
from armor_recipes.checkpoint.verify import verify
from armor_recipes.errors import ArmorError, CheckpointError, PlanError
from armor_recipes.integrations.exporting import export_folder
from tests.support.engine import ARMOR, MLP, make_job, recipe, save_model

FP8 = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "observer": "static_minmax"}
HEADS = {**FP8, "strategy": "attn_head"}
LARGEST = torch.finfo(torch.float8_e4m3fn).max
IDS = torch.arange(12)[None] * 7 % 96


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("cache") / "model", "llama-gqa-tied", torch.float32)


@pytest.fixture(scope="module", params=["tensor", "attn_head"])
def folder(request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of keys and values alone, by tensor or by heads."""
    out = tmp_path_factory.mktemp("cache") / "out"
    scheme = {**FP8, "strategy": request.param}
    armor_recipes.apply(recipe(model, out, QuantizationModifier={"kv_cache_scheme": scheme, "propagate": "dense"}))
    return out


class Rounding(DynamicCache):
    """A cache that takes what is nearest in eight bits, by scales of each layer's keys and values."""

    def __init__(self, scales: list[tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.scales = scales

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        both: Any = [
            ((x / s).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).to(x.dtype) * s)
            for x, s in zip((key_states, value_states), self.scales[layer_idx], strict=True)
        ]
        return super().update(*both, layer_idx, *args, **kwargs)


def logits(model: Any, cache: Any = None, ids: Tensor = IDS) -> Tensor:
    """With a cache, by the name that this release of transformers has for it."""
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    with torch.no_grad():
        found: Tensor = model.eval()(ids, **{name: cache}).logits
    return found


def scales_of(folder: Path) -> list[tuple[Tensor, Tensor]]:
    tensors = load_file(folder / "model.safetensors")
    names = [f"model.layers.{layer}.self_attn" for layer in range(2)]
    return [(tensors[f"{name}.k_scale"], tensors[f"{name}.v_scale"]) for name in names]


def calibration(model: Path) -> Tensor:
    job = make_job(recipe(model, QuantizationModifier={"kv_cache_scheme": HEADS}))
    (spec,) = {entry.config.calibration for entry in job.recipe.modifiers}
    assert spec is not None
    return build_tokens(spec, tokenizer=None, vocab_size=96).ids


def test_scales_are_those_of_the_largest_state(model: Path, folder: Path) -> None:
    cache: Any = DynamicCache()
    logits(AutoModelForCausalLM.from_pretrained(model), cache, calibration(model))
    heads = read_config(folder)["quantization_config"]["kv_cache_scheme"]["strategy"] == "attn_head"
    for layer, found in zip(cache.layers, scales_of(folder), strict=True):
        for states, scale in zip((layer.keys, layer.values), found, strict=True):
            largest = states.abs().amax((0, 2, 3), keepdim=True)[0] if heads else states.abs().max().reshape(1)
            torch.testing.assert_close(scale, largest / LARGEST, rtol=1e-5, atol=0)


def test_a_loaded_folder_rounds_as_such_a_cache(model: Path, folder: Path, tmp_path: Path) -> None:
    verify(folder)
    loaded, dense = armor_recipes.load(folder), AutoModelForCausalLM.from_pretrained(model)
    found = logits(loaded)
    torch.testing.assert_close(found, logits(dense, Rounding(scales_of(folder))), rtol=1e-5, atol=1e-5)
    assert (found - logits(dense)).abs().max() > 1e-3
    steps = DynamicCache()
    parts = [logits(loaded, steps, part) for part in IDS.split([5, 4, 3], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), found, rtol=1e-5, atol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    one, two = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    configs = [read_config(path)["quantization_config"]["kv_cache_scheme"] for path in (folder, tmp_path / "again")]
    assert configs[0] == configs[1]
    assert torch.equal(logits(armor_recipes.load(tmp_path / "again")), found)


def test_beside_quantised_weights_the_plan_and_the_manifest_tell(model: Path, tmp_path: Path) -> None:
    modifier = {"scheme": "W8A8", "targets": [MLP], "kv_cache_scheme": HEADS}
    result = armor_recipes.apply(recipe(model, tmp_path / "out", QuantizationModifier=modifier))
    assert [row.name for row in result.plan.caches] == [f"model.layers.{layer}.self_attn" for layer in range(2)]
    assert len(inspected(tmp_path / "out").plain) == 6
    manifest = json.loads((tmp_path / "out" / "armor_manifest.json").read_text())
    (told,) = {(one["scheme"], one["tokens"]) for one in manifest["kv_cache"]}
    assert told == ("float8 by attn_head", 60)
    loaded = armor_recipes.load(tmp_path / "out")
    keys: Any = loaded.get_submodule("model.layers.0.self_attn").k_scale
    assert keys.shape == (2, 1, 1)
    with pytest.raises(PlanError, match="for which dense has no place"):
        export_folder(tmp_path / "out", tmp_path / "dense", to="dense")


def test_beside_packed_layers(model: Path, tmp_path: Path) -> None:
    modifiers: dict[str, Any] = {
        "ARMORModifier": {**ARMOR, "targets": [MLP]},
        "QuantizationModifier": {"kv_cache_scheme": HEADS},
    }
    armor_recipes.apply(recipe(model, tmp_path / "out", **modifiers))
    loaded = armor_recipes.load(tmp_path / "out", backend="folded")
    assert len(inspected(tmp_path / "out").layers) == 6
    assert torch.equal(logits(loaded), logits(copy.deepcopy(loaded)))
    with pytest.raises(PlanError, match=r"keys and values of model\.layers\.0\.self_attn are quantised"):
        armor_recipes.to_dense(loaded)
    given = recipe(tmp_path / "out", QuantizationModifier={"scheme": "W8A8", "targets": [MLP]})
    with pytest.raises(PlanError, match="which a recipe would lose"):
        make_job(given)


def test_dynamic_scales_need_no_calibration_and_no_tensors(model: Path, tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True, "strategy": "token"}
    mapping = recipe(model, tmp_path / "out", QuantizationModifier={"kv_cache_scheme": scheme})
    del mapping["calibration"]
    armor_recipes.apply(mapping)
    assert not any(name.endswith("_scale") for name in load_file(tmp_path / "out" / "model.safetensors"))
    dense = logits(AutoModelForCausalLM.from_pretrained(model))
    assert 1e-4 < (logits(armor_recipes.load(tmp_path / "out")) - dense).abs().max() < 0.1


def test_the_last_cache_counts(model: Path) -> None:
    both: dict[str, Any] = {
        "QuantizationModifier@one": {"kv_cache_scheme": HEADS},
        "QuantizationModifier@two": {"kv_cache_scheme": {**FP8, "strategy": "tensor"}},
    }
    plan = make_job(recipe(model, **both)).plan
    assert {row.described for row in plan.caches} == {"keys and values float8 by tensor"}
    assert {one.what for one in plan.overridden} == {"keys and values float8 by attn_head"}


@pytest.mark.parametrize(
    ("scheme", "data", "text"),
    [
        ({**FP8, "strategy": "channel"}, True, "is none of a cache: take tensor, or attn_head"),
        (HEADS, False, "scales of keys and values come from calibration inputs"),
        ({**HEADS, "num_bits": 5}, True, "kv_cache_scheme: compressed-tensors refuses it"),
    ],
)
def test_refused_in_a_plan(model: Path, scheme: dict[str, Any], data: bool, text: str) -> None:
    mapping = recipe(model, QuantizationModifier={"kv_cache_scheme": scheme})
    if not data:
        del mapping["calibration"]
    with pytest.raises(ArmorError, match=text):
        make_job(mapping)


def test_attention_without_such_projections_is_refused(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model", "gpt-neox")
    with pytest.raises(PlanError, match="GPTNeoXForCausalLM has no attention module with projections"):
        make_job(recipe(folder, QuantizationModifier={"kv_cache_scheme": HEADS}))


@pytest.mark.parametrize("damage", ["half", "layer", "scheme"])
def test_damaged_folders(folder: Path, tmp_path: Path, damage: str) -> None:
    other = tmp_path / "other"
    other.mkdir()
    config, tensors = json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors")
    lost = {"half": ["v_scale"], "layer": ["k_scale", "v_scale"], "scheme": []}[damage]
    tensors = {n: t for n, t in tensors.items() if n not in {f"model.layers.1.self_attn.{part}" for part in lost}}
    if damage == "scheme":
        config["quantization_config"]["kv_cache_scheme"]["num_bits"] = "many"
    (other / "config.json").write_text(json.dumps(config))
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    text = {
        "half": "no file holds v_scale of",
        "layer": "has no cache, or no scales for it",
        "scheme": "kv_cache_scheme is none",
    }
    with pytest.raises(CheckpointError, match=text[damage]):
        armor_recipes.load(other)
