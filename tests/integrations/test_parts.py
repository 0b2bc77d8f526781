"""Composite configs: parts with implementations of their own, several text models, and names that loading leaves alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from armor_recipes.integrations.models import attention_of, load_dense
from armor_recipes.integrations.names import misread
from armor_recipes.model.facts import facts_of, text_config
from armor_recipes.model.forms import fused_keys
from tests.support.families import main_class, tiny_config, tiny_model

pytestmark = pytest.mark.filterwarnings("default")  # transformers' own of some families


def tiny(model_type: str) -> transformers.PreTrainedModel:
    kind = main_class(model_type)
    assert kind is not None
    return tiny_model(kind, tiny_config(model_type))


def test_a_part_without_the_others_attention_keeps_its_own(tmp_path: Path) -> None:
    """One name for all parts is an error of transformers where a backbone has no such implementation."""
    tiny("pp_ocrv6_small_rec").save_pretrained(tmp_path)
    model = load_dense(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"))
    found = attention_of(model)
    assert found == {"": "sdpa", "backbone_config": "eager"}
    again = load_dense(str(tmp_path), dtype=torch.float32, device=torch.device("cpu"), attention=found)
    assert attention_of(again) == found


def test_one_name_where_all_parts_have_it() -> None:
    assert attention_of(tiny("clip")) == "sdpa"


def test_of_several_text_models_the_one_that_reads_text_counts() -> None:
    parts = {name: tiny_config(name) for name in ("t5", "encodec", "musicgen_decoder")}
    config = transformers.MusicgenConfig(
        text_encoder=parts["t5"], audio_encoder=parts["encodec"], decoder=parts["musicgen_decoder"]
    )
    assert text_config(config).model_type == "t5"
    assert facts_of(config).vocab_size == parts["t5"].vocab_size


def test_experts_that_files_may_hold_transposed_are_read_as_they_are_in_the_model() -> None:
    model = tiny("qwen3_vl_moe")
    assert misread(model, fused_keys(model)) == []
