"""What a model's config says, read here and nowhere else: the text model's part of a composite config counts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Numbers that every architecture calls by transformers' common names; None where a config does not tell.

    Attributes:
        hidden_size: width of what passes from block to block.
        vocab_size: rows of the token embedding.
        positions: the longest sequence, in tokens.
        heads: attention heads of a block.
        key_value_heads: heads of keys and values; as many as `heads` where a config names none.
        head_dim: width of one head.
        dtype: of the weights, by the config.
        attention: the attention implementation in use; None where transformers chose none.
        encoder_decoder: whether an encoder goes before the decoder.
        caches: whether it keeps what it read for the next token, unless it is told not to.
        quantized: whether the config describes quantised or compressed weights.
        experts_per_token: experts of a layer that a router gives a token to, in a mixture of experts.
    """

    hidden_size: int | None
    vocab_size: int | None
    positions: int | None
    heads: int | None
    key_value_heads: int | None
    head_dim: int | None
    dtype: torch.dtype | None
    attention: str | None
    encoder_decoder: bool
    caches: bool
    quantized: bool
    experts_per_token: int | None = None


@dataclass(frozen=True, slots=True)
class InputFacts:
    """What a config says of a model's inputs, by transformers' common names; None, or empty, where it does not tell.

    Attributes:
        vocab_size: rows of the embedding of `input_ids`.
        decoder_start: the id that a decoder's tokens begin with after an encoder.
        padding: the id that fills sequences up.
        end: the id that ends a text.
        special: ids that stand for something else than text, sorted, all below `vocab_size`.
        image_token: the id in a text that stands for a part of an image.
        image_size: height and width of images, in pixels.
        channels: of images.
        frames: images that make a video.
        image_tokens: tokens that stand for an image, where a config says how many.
        patch: pixels in a patch of an image; `patch_time` frames in it, `merge` such patches in a row that make one token.
        patch_time: see `patch`.
        merge: see `patch`.
        tiles: parts that an image is cut into at most, where that is a dimension.
        mel_bins: values of a frame of a spectrogram.
        mel_frames: frames that a model takes: all of them, or half of them where its first layer halves them, as Whisper's.
        audio_stride: samples of sound for each frame.
        audio_channels: of sound; None where a model takes one and has no dimension for it.
    """

    vocab_size: int | None
    decoder_start: int | None
    padding: int | None
    end: int | None
    special: tuple[int, ...]
    image_token: int | None
    image_size: tuple[int, int] | None
    channels: int | None
    frames: int | None
    image_tokens: int | None
    patch: int | None
    patch_time: int | None
    merge: int | None
    tiles: int | None
    mel_bins: int | None
    mel_frames: int | None
    audio_stride: int | None
    audio_channels: int | None


def input_facts(config: Any) -> InputFacts:
    """The facts of a config and its parts: of images what its vision part says, of sound its audio part, else itself."""
    text = text_config(config)
    texts = [config, text, *(part for name, part in _sections(config) if _TEXT.search(name))]
    images = [part for name, part in _sections(config) if _IMAGE.search(name)] + [config]
    sounds = [part for name, part in _sections(config) if _SOUND.search(name)] + [config]
    vocabulary = _first(texts[1:] + texts[:1], "vocab_size")
    return InputFacts(
        vocab_size=vocabulary,
        decoder_start=_id(texts, "decoder_start_token_id"),
        padding=_id(texts, "pad_token_id"),
        end=_id(texts, "eos_token_id"),
        special=_special(config, vocabulary or 0),
        image_token=_id([config, *(part for _, part in _sections(config))], "image_token_id", "image_token_index"),
        image_size=_pair(images, "image_size", "img_size"),
        channels=_first(images, "num_channels", "in_channels", "in_chans", "num_input_channels"),
        frames=_first(images, "num_frames", "frames_per_clip"),
        image_tokens=_first(
            [part for _, part in _sections(config)] + [config], "mm_tokens_per_image", "resampler_n_latents"
        ),
        patch=_first(images, "patch_size"),
        patch_time=_first(images, "temporal_patch_size"),
        merge=_first(images, "spatial_merge_size", "scale_factor"),
        tiles=_first(images, "max_num_tiles"),
        mel_bins=_first(sounds, "num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", "input_dim"),
        mel_frames=_first(sounds, "max_source_positions", "max_length"),
        audio_stride=_product(sounds, "conv_stride", "upsampling_ratios", "downsampling_ratios"),
        audio_channels=_first(sounds, "audio_channels"),
    )


_TEXT, _IMAGE, _SOUND = (
    re.compile("text|decoder"),
    re.compile("vision|image|vit"),
    re.compile("audio|speech|sound|encoder"),
)


def _sections(config: Any) -> list[tuple[str, Any]]:
    """A config's parts, theirs too, with the name of each."""
    return [inner for name, part in _parts(config) for inner in ((name, part), *_sections(part))]


def _parts(config: Any) -> list[tuple[str, Any]]:
    """A config's own parts with their names."""
    parts = [(name, getattr(config, name, None)) for name in getattr(config, "sub_configs", {})]
    return [(name, part) for name, part in parts if part is not None and not isinstance(part, dict)]


def _first(configs: list[Any], *names: str) -> int | None:
    numbers = (_number(config, name) for config in configs for name in names)
    return next((number for number in numbers if number is not None), None)


def _id(configs: list[Any], *names: str) -> int | None:
    ids = (_value(config, name) for config in configs for name in names)
    return next((value for value in ids if type(value) is int and value >= 0), None)


def _pair(configs: list[Any], *names: str) -> tuple[int, int] | None:
    for value in (_value(config, name) for config in configs for name in names):
        if type(value) is int:
            return value, value
        if isinstance(value, (list, tuple)) and len(value) == 2 and all(type(side) is int for side in value):
            return value[0], value[1]
    return None


def _product(configs: list[Any], *names: str) -> int | None:
    for value in (_value(config, name) for config in configs for name in names):
        if isinstance(value, (list, tuple)) and value and all(type(each) is int for each in value):
            return math.prod(value)
    return None


def _special(config: Any, vocabulary: int) -> tuple[int, ...]:
    """Ids below `vocabulary` that a config or a part of it calls a token's."""
    configs = [config, *(part for _, part in _sections(config))]
    named = {name for each in configs for name in vars(each) if _TOKEN_ID.fullmatch(name)}
    ids = (_value(each, name) for each in configs for name in sorted(named))
    return tuple(sorted({value for value in ids if type(value) is int and 0 <= value < vocabulary}))


_TOKEN_ID = re.compile(r".*_token_(id|index)")


def _value(config: Any, name: str) -> Any:
    """A config's value; None for one that layers differ in."""
    try:
        return getattr(config, name, None)
    except Exception:  # transformers' error for it has no public class
        return None


def facts_of(config: Any) -> ModelFacts:
    """The facts of a config; of None, none. Numbers are those of the text model where there are several."""
    text = text_config(config)
    hidden, heads, width = (_number(text, name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    if width is None and hidden and heads:
        width = hidden // heads
    dtypes = (getattr(section, "dtype", None) for section in (config, text))
    attention = getattr(config, "_attn_implementation", None)
    return ModelFacts(
        hidden_size=hidden,
        vocab_size=_number(text, "vocab_size"),
        positions=_number(text, "max_position_embeddings"),
        heads=heads,
        key_value_heads=_number(text, "num_key_value_heads") or heads,
        head_dim=width,
        dtype=next((dtype for dtype in dtypes if isinstance(dtype, torch.dtype)), None),
        attention=attention if isinstance(attention, str) else None,
        encoder_decoder=getattr(config, "is_encoder_decoder", False) is True,
        caches=any(getattr(section, "use_cache", False) is True for section in (config, text)),
        quantized=getattr(config, "quantization_config", None) is not None,
        experts_per_token=_experts_per_token(text),
    )


def attention_of_parts(config: Any) -> str | dict[str, Any] | None:
    """The attention implementation in use; a dict by the names of a config's parts where they run on others, its own under ''.

    Parts may be dicts again; transformers' `attn_implementation` takes either form.
    """
    own = getattr(config, "_attn_implementation", None)
    found = {name: attention_of_parts(part) for name, part in _parts(config) if hasattr(part, "_attn_implementation")}
    return own if all(value == own for value in found.values()) else {"": own, **found}


def _experts_per_token(text: Any) -> int | None:
    """By the names that configs have for it, some in a section of their own."""
    sections = (text, getattr(text, "ffn_config", None))
    names = ("num_experts_per_tok", "top_k_experts", "moe_top_k", "moe_topk", "moe_k", "num_selected_experts")
    found = (_number(section, name) for section in sections for name in names)
    return next((number for number in found if number is not None), None)


def text_config(config: Any) -> Any:
    """The part of a composite config that is the text model's; a config without parts itself."""
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # of several text models, the one that reads the text (Musicgen's decoder writes sound)
        return config.get_text_config(encoder=True)


def model_facts(model: nn.Module) -> ModelFacts:
    """The facts of a model's config."""
    return facts_of(getattr(model, "config", None))


def _number(config: Any, name: str) -> int | None:
    value = _value(config, name)
    return value if isinstance(value, int) and value > 0 else None


def class_numbers(config: Any) -> dict[str, int]:
    """The numbers of a classifier's classes by their names; `LABEL_0` and so on where a config names none."""
    names = getattr(config, "id2label", None) or {}
    return {str(name): int(number) for number, name in names.items()}
