"""`builtin:random-inputs`: random arguments of a forward pass, from config and signature alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    CanineConfig,
    CanineModel,
    CLIPConfig,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
    Wav2Vec2Config,
    Wav2Vec2Model,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from armor_recipes.calibration.inputs import InputSet, arguments
from armor_recipes.calibration.tokens import build_inputs, build_tokens
from armor_recipes.errors import InputError
from armor_recipes.model.inputs import model_inputs
from armor_recipes.model.replay import feed, on_device
from armor_recipes.recipe.schema import AtMost, CalibrationSpec
from tests.support.engine import rng_states

TEXT = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 32}
VISION = {
    "hidden_size": 16,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "image_size": 16,
}
T5 = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=3)
WHISPER = WhisperConfig(
    vocab_size=64,
    d_model=16,
    num_mel_bins=8,
    encoder_layers=1,
    decoder_layers=1,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=32,
    decoder_ffn_dim=32,
    max_source_positions=20,
    max_target_positions=16,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=3,
)
LLAVA = LlavaConfig(
    text_config={"model_type": "llama", **TEXT},
    vision_config={"model_type": "clip_vision_model", **VISION, "patch_size": 4},
    image_token_index=63,
)
QWEN = Qwen3VLConfig(
    text_config={
        **TEXT,
        "head_dim": 8,
        "num_key_value_heads": 2,
        "rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1]},
    },
    vision_config={
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 32,
        "out_hidden_size": 16,
        "patch_size": 4,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0],
    },
    image_token_id=63,
    video_token_id=62,
    vision_start_token_id=61,
    vision_end_token_id=60,
)
WAV2VEC = Wav2Vec2Config(
    **TEXT,
    conv_dim=(16, 16),
    conv_stride=(4, 2),
    conv_kernel=(4, 2),
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)
CASES: dict[str, tuple[type[PreTrainedModel], Any, dict[str, tuple[int, ...]]]] = {
    "decoder": (LlamaForCausalLM, LlamaConfig(**TEXT), {"input_ids": (8,)}),
    "encoder": (BertModel, BertConfig(**TEXT), {"input_ids": (8,)}),
    "encoder and decoder": (T5ForConditionalGeneration, T5, {"input_ids": (8,), "decoder_input_ids": (8,)}),
    "images": (ViTForImageClassification, ViTConfig(**VISION, patch_size=4), {"pixel_values": (3, 16, 16)}),
    "image and text": (
        CLIPModel,
        CLIPConfig(text_config={**TEXT, "eos_token_id": 5}, vision_config={**VISION, "patch_size": 4}),
        {"input_ids": (8,), "pixel_values": (3, 16, 16)},
    ),
    "image in a text": (
        LlavaForConditionalGeneration,
        LLAVA,
        {"input_ids": (24,), "pixel_values": (3, 16, 16)},
    ),
    "patches in a text": (
        Qwen3VLForConditionalGeneration,
        QWEN,
        {"input_ids": (24,), "mm_token_type_ids": (24,), "pixel_values": (64, 96), "image_grid_thw": (3,)},
    ),
    "spectrogram": (
        WhisperForConditionalGeneration,
        WHISPER,
        {"input_features": (8, 40), "decoder_input_ids": (8,)},
    ),
    "sound": (
        Wav2Vec2Model,
        WAV2VEC,
        {"input_values": (72,)},
    ),
}


def spec(**keys: Any) -> CalibrationSpec:
    return CalibrationSpec(dataset="builtin:random-inputs", **{"sequence_length": 8, "samples": 3, **keys})


def shapes(kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    with torch.device("meta"):
        return kind(config)


def build(kind: type[PreTrainedModel], config: Any, **keys: Any) -> InputSet:
    return build_inputs(spec(**keys), model_inputs(shapes(kind, config)))


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_model_runs_on_them(name: str) -> None:
    kind, config, expected = CASES[name]
    planned = shapes(kind, config)
    state = rng_states()
    found = build_inputs(spec(), model_inputs(planned))
    assert str(state) == str(rng_states())
    assert {name: tuple(tensor.shape[1:]) for name, tensor in found.tensors.items()} == expected
    model = kind(config).eval()
    with torch.no_grad():
        feed(model, on_device(found.tensors, model))


@pytest.mark.parametrize("name", ["encoder and decoder", "image in a text"])
def test_they_follow_from_the_seed_alone(name: str) -> None:
    kind, config, _ = CASES[name]
    one, again, other = (build(kind, config, seed=seed) for seed in (1, 1, 2))
    assert one.sha256 == again.sha256 != other.sha256
    assert len(build(kind, config, samples=AtMost(at_most=5))) == 5


def test_special_ids_stand_in_their_places_and_nowhere_else() -> None:
    found = build(T5ForConditionalGeneration, T5, samples=64)
    assert found.tensors["decoder_input_ids"][:, 0].tolist() == [3] * 64
    assert found.ids[:, -1].tolist() == [1] * 64  # eos_token_id
    assert not {0, 1, 3} & set(found.ids[:, :-1].flatten().tolist())  # 0 pads
    images = build(LlavaForConditionalGeneration, LLAVA, samples=8).ids == 63
    assert images.sum(dim=1).tolist() == [16] * 8
    assert bool(images[:, 1:17].all())


def test_floats_are_cast_at_the_door_of_the_model() -> None:
    model = ViTForImageClassification(CASES["images"][1]).to(torch.bfloat16)
    batch = on_device(build(ViTForImageClassification, model.config).tensors, model)
    assert batch["pixel_values"].dtype == torch.bfloat16
    assert on_device({"input_ids": torch.ones(1, 2, dtype=torch.int64)}, model)["input_ids"].dtype == torch.int64


def test_what_cannot_be_made_is_told() -> None:
    with pytest.raises(
        InputError, match=r"inputs of CanineModel: it reads tokens.*give a \.safetensors file of inputs"
    ):
        build(CanineModel, CanineConfig())
    with pytest.raises(InputError, match="needs a model whose inputs are known"):
        build_tokens(spec(), tokenizer=None, vocab_size=9)


def test_arguments_are_those_of_the_forward_pass() -> None:
    found = model_inputs(shapes(T5ForConditionalGeneration, T5))
    assert {"input_ids", "attention_mask", "decoder_input_ids"} <= set(found.arguments)
    assert not {"self", "kwargs"} & set(found.arguments)
    assert (found.name, found.vocab_size, found.decoder_start, found.padding) == (
        "T5ForConditionalGeneration",
        64,
        3,
        0,
    )
    assert found.encoder_decoder
    assert not found.closes
    assert model_inputs(shapes(BertModel, BertConfig(**TEXT))).closes


@pytest.mark.parametrize("grids", ["image_grid_thw", "grid_thw"])
def test_patches_of_all_samples_are_one_list_for_a_model_that_reads_grids(grids: str) -> None:
    pixels = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
    batch = {"pixel_values": pixels, grids: torch.tensor([[1, 2, 2]] * 2)}
    assert torch.equal(arguments(batch)["pixel_values"], pixels.view(8, 3))
    assert arguments({"pixel_values": pixels})["pixel_values"] is pixels
    assert arguments({grids: batch[grids]}).keys() == {grids}
