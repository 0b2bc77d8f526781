"""Whole folders against llm-compressor's own: every tensor, and the logits of stock transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import armor_recipes
from armor_recipes.calibration.tokens import build_tokens
from tests.llmcompressor.conftest import oneshot_model
from tests.support.engine import make_job

pytestmark = [
    pytest.mark.llmcompressor,
    pytest.mark.filterwarnings("ignore:Attempting to save a model with offloaded modules"),
]
CALIBRATION = {"dataset": "builtin:pydoc", "samples": 8, "sequence_length": 64, "batch_size": 1}
STATIC = {"num_bits": 8, "strategy": "tensor"}
ROWS = {"num_bits": 8, "strategy": "channel"}
FP8 = {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True}
CASES: dict[str, dict[str, Any]] = {
    "FP8": {"scheme": "FP8"},
    "NVFP4": {"scheme": "NVFP4"},
    "static W8A8": {"config_groups": {"g": {"targets": ["Linear"], "weights": ROWS, "input_activations": STATIC}}},
    "outputs": {"config_groups": {"g": {"targets": [r"re:.*k_proj$"], "weights": ROWS, "output_activations": STATIC}}},
    "cache alone": {"kv_cache_scheme": {**FP8, "strategy": "tensor"}},
    "cache of heads": {"scheme": "FP8_DYNAMIC", "kv_cache_scheme": {**FP8, "strategy": "attn_head"}},
}
CASES["observers"] = {
    "config_groups": {"g": {**CASES["static W8A8"]["config_groups"]["g"]}},
    "weight_observer": "imatrix_mse",
}
CASES["observers"]["input_observer"] = "mse"


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
    oneshot_model(model, {"quant_stage": recipe()["quant_stage"]}, ids).save_pretrained(theirs)  # type: ignore[operator]
    armor_recipes.apply(recipe(propagate="dense"))
    found, wanted = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype
        torch.testing.assert_close(found[key].float(), value.float(), rtol=1e-5, atol=0, msg=key)
    with torch.no_grad():
        one, two = (
            AutoModelForCausalLM.from_pretrained(folder, dtype="auto")(ids[:1]).logits for folder in (ours, theirs)
        )
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
