"""Folders with zero points, or scales of activations, keys and values, against llm-compressor's own: every tensor, and logits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import armor_recipes
from armor_recipes.calibration.tokens import build_tokens
from tests.llmcompressor.conftest import oneshot
from tests.support.engine import make_job

pytestmark = [
    pytest.mark.llmcompressor,
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules"),
]
CALIBRATION = {"dataset": "builtin:pydoc", "samples": 8, "sequence_length": 64, "batch_size": 1}
OBSERVED = ("input_scale", "input_global_scale", "output_scale", "k_scale", "v_scale")
STATIC = {"num_bits": 8, "strategy": "tensor"}
ROWS = {"num_bits": 8, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True}
CASES: dict[str, dict[str, Any]] = {
    "FP8": {"scheme": "FP8"},
    "FP8, tied output": {"scheme": "FP8", "ignore": []},
    "NVFP4": {"scheme": "NVFP4"},
    "W4A16_ASYM": {"scheme": "W4A16_ASYM"},
    "static W8A8": {"config_groups": {"g": {"targets": ["Linear"], "weights": ROWS, "input_activations": STATIC}}},
    "outputs": {"config_groups": {"g": {"targets": [r"re:.*k_proj$"], "weights": ROWS, "output_activations": STATIC}}},
    "cache alone": {"kv_cache_scheme": {**FP8, "strategy": "tensor"}},
    "cache of heads": {"scheme": "FP8_DYNAMIC", "kv_cache_scheme": {**FP8, "strategy": "attn_head"}},
}
CASES["observers"] = {**CASES["static W8A8"], "weight_observer": "imatrix_mse", "input_observer": "mse"}


@pytest.mark.parametrize("name", CASES)
def test_folders_are_equal(name: str, model: Path, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    modifier = {"ignore": ["lm_head"], **CASES[name]}
    modifier |= {} if "config_groups" in modifier else {"targets": ["Linear"]}

    def recipe(**fields: Any) -> dict[str, Any]:
        stage = {"quant_stage": {"quant_modifiers": {"QuantizationModifier": {**modifier, **fields}}}}
        return {"model": str(model), "calibration": CALIBRATION, **stage, "output": {"path": str(ours)}}

    (spec,) = {entry.config.calibration for entry in make_job(recipe()).recipe.modifiers}
    assert spec is not None
    ids = build_tokens(spec, tokenizer=AutoTokenizer.from_pretrained(model), vocab_size=2048).ids
    oneshot(model, {"quant_stage": recipe()["quant_stage"]}, ids).save_pretrained(theirs)  # type: ignore[operator]
    armor_recipes.apply(recipe(propagate="dense"))
    found, wanted = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        if key.endswith(OBSERVED):  # the last bits of activations are those of the order of sums in a forward pass
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=0, msg=key)
        else:
            assert torch.equal(found[key].float(), value.float()), key
    dtype = (
        torch.bfloat16 if name == "NVFP4" else torch.float32
    )  # in which it decompresses a float32 model's weights, too
    assert torch.equal(logits(ours, ids, dtype), logits(ours, ids, dtype, armor_recipes.load))
    shutil.copy(theirs / "model.safetensors", ours)
    assert torch.equal(logits(ours, ids, dtype), logits(theirs, ids, dtype))


def logits(
    folder: Path, ids: torch.Tensor, dtype: torch.dtype, load: Any = AutoModelForCausalLM.from_pretrained
) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = load(folder, dtype=dtype)(ids[:1]).logits
    return found
