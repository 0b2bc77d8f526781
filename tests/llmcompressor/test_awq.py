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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose largest weights are above zero. One below, the lowest of its group, lies at -7.5 steps, between two integers:
    the last bit of a sum of activations decides, and so may which of two candidates that are alike is taken.
    """
    folder, sizes = tmp_path_factory.mktemp("tiny"), {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 2048}
    config = LlamaConfig(**sizes, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = LlamaForCausalLM(config)
        for name, value in made.named_parameters():
            drawn = torch.randn(value.shape) * (0.3 if "norm" in name else 0.1) + ("norm" in name)
            value.data = drawn if "norm" in name else torch.where(drawn < 0, LEAN * drawn, drawn)
    made.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model_folder("stdlib-llama")).save_pretrained(folder)
    return folder


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


def _rounded(weights: Weights, name: str, scheme: str) -> Tensor:
    """llm-compressor's smoothed weight as the scales beside it round it."""
    from compressed_tensors.quantization import fake_quantize, preset_name_to_scheme

    args = preset_name_to_scheme(scheme, ["Linear"]).weights
    scale = weights[name.replace("weight", "weight_scale")]
    zero = weights.get(name.replace("weight", "weight_zero_point"), torch.zeros_like(scale))
    return fake_quantize(weights[name], scale, zero, args)
