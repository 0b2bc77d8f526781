"""AWQ: llm-compressor's own scales and weights, for each scheme that its search is told to round to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from armor_recipes.builtin import model_folder
from tests.llmcompressor.conftest import Both, Weights, runs

pytestmark = pytest.mark.llmcompressor
MAPPINGS = [
    {"smooth_layer": "re:.*input_layernorm$", "balance_layers": ["re:.*q_proj$", "re:.*k_proj$", "re:.*v_proj$"]},
    {"smooth_layer": "re:.*up_proj$", "balance_layers": ["re:.*down_proj$"], "activation_hook_target": None},
]
CASES: list[tuple[dict[str, Any], str]] = [
    ({}, "W4A16"),
    ({"duo_scaling": "both", "n_grid": 10}, "W4A16_ASYM"),
    ({"duo_scaling": False, "mappings": MAPPINGS}, "W8A8"),
    ({}, "FP8_DYNAMIC"),
]
#: By how much less weights below zero are drawn.
LEAN = 0.5


def made(folder: Path, *, bias: bool = False, heads: int = 2) -> Path:
    """A model whose largest weights are above zero. One below, the lowest of its group, lies at -7.5 steps, between two integers:
    the last bit of a sum of activations decides, and so may which of two candidates that are alike is taken.
    """
    sizes = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 2048, "num_hidden_layers": 2}
    grouped = {"num_attention_heads": heads, "num_key_value_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**sizes, **grouped, attention_bias=bias, mlp_bias=bias))
        for name, value in model.named_parameters():
            drawn = torch.randn(value.shape) * (0.3 if "norm" in name else 0.1) + ("norm" in name)
            value.data = drawn if "norm" in name else torch.where(drawn < 0, LEAN * drawn, drawn)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder("stdlib-llama")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def both(model: Path) -> Both:
    return runs(model, samples=8, sequence_length=64)


@pytest.fixture(autouse=True)
def unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is pinned for an accelerator, and without one torch refuses to."""
    from llmcompressor.pipelines.cache import IntermediatesCache

    monkeypatch.setattr(IntermediatesCache, "pin_memory", lambda *_: None)


@pytest.mark.parametrize(("fields", "scheme"), CASES, ids=[scheme for _, scheme in CASES])
def test_scales_and_weights_are_equal(fields: dict[str, Any], scheme: str, both: Both) -> None:
    quantiser = {"scheme": scheme, "targets": ["Linear"], "ignore": ["lm_head"]}
    modifiers = {"AWQModifier": fields, "QuantizationModifier": quantiser}
    theirs, ours = both(modifiers, AWQModifier={"propagate": "dense"})
    rounded = [name for name in ours if name.endswith("_proj.weight")]
    for name in (name for name in ours if name not in rounded):
        assert float((ours[name] - theirs[name]).norm() / theirs[name].norm()) < 1e-5, name
    for name in rounded:  # equal but for near ties
        other = (ours[name] - _rounded(theirs, name, scheme)).abs() > 1e-5 * ours[name].abs().max()
        assert float(other.float().mean()) < 1e-3, name


def group(size: int, *, symmetric: bool) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": size, "symmetric": symmetric}
    return {"config_groups": {"g": {"targets": ["Linear"], "weights": weights}}}


SMOOTHED: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "asymmetric 128": ({"n_grid": 7}, {"scheme": "W4A16_ASYM", "targets": ["Linear"]}, {}),
    "symmetric 128, biases": ({"n_grid": 8, "duo_scaling": "both"}, group(128, symmetric=True), {"bias": True}),
    "asymmetric 64, biases": ({"n_grid": 5, "mappings": MAPPINGS}, group(64, symmetric=False), {"bias": True}),
    "NVFP4, one scale for q, k and v": ({"n_grid": 4}, {"scheme": "NVFP4A16", "targets": ["Linear"]}, {}),
    "symmetric 64, grouped heads": ({"n_grid": 6, "duo_scaling": False}, group(64, symmetric=True), {"heads": 4}),
}


@pytest.mark.parametrize("name", SMOOTHED)
def test_smoothed_weights_are_equal(name: str, tmp_path: Path) -> None:
    """Before anything is rounded: norms, biases and weights, in which all scales are."""
    fields, scheme, sizes = SMOOTHED[name]
    modifiers = {"AWQModifier": fields, "QuantizationModifier": {**scheme, "ignore": ["lm_head"]}}
    both = runs(made(tmp_path, **sizes), samples=8, sequence_length=64)
    theirs, ours = both(modifiers, without="QuantizationModifier", AWQModifier={"propagate": "dense"})
    dense = LlamaForCausalLM.from_pretrained(tmp_path).state_dict()
    for tensor, value in ours.items():
        assert float((value - theirs[tensor]).norm() / theirs[tensor].norm()) < 1e-5, tensor
    for norm in (tensor for tensor in ours if "layernorm" in tensor):  # by how much its outputs are divided
        scales, wanted = dense[norm] / ours[norm], dense[norm] / theirs[norm]
        assert torch.allclose(scales, wanted, rtol=1e-5), norm
    assert any(not torch.equal(dense[tensor], value) for tensor, value in ours.items())


def _rounded(weights: Weights, name: str, scheme: str) -> Tensor:
    """llm-compressor's smoothed weight as the scales beside it round it."""
    from compressed_tensors.quantization import fake_quantize, preset_name_to_scheme

    args = preset_name_to_scheme(scheme, ["Linear"]).weights
    scale = weights[name.replace("weight", "weight_scale")]
    zero = weights.get(name.replace("weight", "weight_zero_point"), torch.zeros_like(scale))
    return fake_quantize(weights[name], scale, zero, args)
