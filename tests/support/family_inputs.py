"""Inputs for a model of any family: named tensors, found by its forward's signature and by trying."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tests.support.families import HIDDEN, IMAGE, PATCH

SAMPLES, LENGTH = 2, 16
Inputs = dict[str, Any]


def inputs_for(model: PreTrainedModel, samples: int = SAMPLES) -> Inputs:
    """Random named tensors that the model's forward takes, images and sounds among them where it can; ValueError with the reasons."""
    reasons = []
    for inputs in _candidates(model, samples):
        for _ in range(4):
            try:
                with torch.no_grad():
                    first_tensor(model(**inputs))
                return inputs
            except Exception as error:  # whatever the family's code meets first
                reasons.append(f"{sorted(inputs)}: {type(error).__name__}: {' '.join(str(error).split())[-160:]}")
                changed = _with_placeholders(model, inputs, str(error))
                if changed is None:
                    break
                inputs = changed
    raise ValueError(" | ".join(reasons) or f"{type(model).__name__} has no forward that is known here")


def first_tensor(output: Any) -> Tensor:
    """The first float tensor of an output of any kind."""
    found = next(tensors_of(output), None)
    if found is None:
        raise ValueError(f"no tensor in a {type(output).__name__}")
    return found


def tensors_of(output: Any) -> Iterator[Tensor]:
    """Every float tensor of an output, in order; caches are no part of it."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
        return
    if hasattr(output, "items"):
        output = [value for key, value in output.items() if "past_key_values" not in key and "cache" not in key]
    if isinstance(output, (list, tuple)):
        for value in output:
            yield from tensors_of(value)


def _candidates(model: PreTrainedModel, samples: int) -> Iterator[Inputs]:
    names = _parameters(model)
    draw = _Draw(samples)
    pictures: list[Inputs] = [*_pictures(model, names, draw), {}]
    sounds: list[Inputs] = [*_sounds(model, names, draw), {}]
    for text in _texts(model, names, draw):
        for picture in pictures:
            for sound in sounds:
                if text or picture or sound:
                    yield {**text, **sound, **picture}


class _Draw:
    """Random tensors of one seed."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def ids(self, length: int, most: int = 200) -> Tensor:
        generator = torch.Generator().manual_seed(length)
        return torch.randint(8, most, (self.samples, length), generator=generator)

    def floats(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape))).bfloat16().float()


def _texts(model: PreTrainedModel, names: set[str], draw: _Draw) -> Iterator[Inputs]:
    ids = draw.ids(LENGTH, min(200, _first(model.config, "vocab_size") or 200))
    decoder = {"decoder_input_ids": draw.ids(8)} if "decoder_input_ids" in names else {}
    if "qformer_input_ids" in names:
        decoder["qformer_input_ids"] = draw.ids(4)
    if "past_values" in names:
        yield from _series(model, draw)
    if "input_ids" in names:
        yield {"input_ids": ids, **decoder}
        if "decoder_input_ids" in decoder and not model.config.is_encoder_decoder:
            yield {"input_ids": ids, **{n: v for n, v in decoder.items() if n != "decoder_input_ids"}}
        if "bbox" in names:
            yield {"input_ids": ids, "bbox": torch.zeros(draw.samples, LENGTH, 4, dtype=torch.long)}
        yield {"input_ids": ids[:, None].expand(-1, 2, -1).contiguous(), **decoder}  # choices
        yield {"input_ids": ids, "attention_mask": torch.ones_like(ids), **decoder}
    yield decoder
    if decoder:
        yield {}


def _series(model: PreTrainedModel, draw: _Draw) -> Iterator[Inputs]:
    length, n, config = _first(model.config, "context_length") or 16, draw.samples, model.config
    channels = _first(config, "num_input_channels", "input_size") or 1
    lags = max(getattr(config, "lags_sequence", None) or [0])
    past = {"past_values": draw.floats(n, length + lags) if channels == 1 else draw.floats(n, length, channels)}
    names = _parameters(model)
    if "past_time_features" in names:
        times = getattr(config, "num_time_features", 0)
        past |= {
            "past_time_features": draw.floats(n, length + lags, times),
            "past_observed_mask": torch.ones(n, length + lags),
        }
        ahead = getattr(config, "prediction_length", 8)
        past |= {"future_values": draw.floats(n, ahead), "future_time_features": draw.floats(n, ahead, times)}
    yield past


def _pictures(model: PreTrainedModel, names: set[str], draw: _Draw) -> Iterator[Inputs]:
    config = model.config
    channels, size, n = _first(config, "num_channels", "in_channels") or 3, _image_size(config), draw.samples
    if "pixel_values" in names:
        if names & {"image_grid_thw", "grid_thw"}:
            grid = "image_grid_thw" if "image_grid_thw" in names else "grid_thw"
            patch = _first(config, "patch_size") or PATCH
            width = channels * (_first(config, "temporal_patch_size") or 1) * patch * patch
            yield {"pixel_values": draw.floats(16 * n, width), grid: torch.tensor([[1, 4, 4]] * n)}
            yield {"pixel_values": draw.floats(16 * n, channels, patch, patch), grid: torch.tensor([[1, 4, 4]] * n)}
        if "image_sizes" in names:
            sizes = torch.tensor([[size, size]] * n)
            yield {"pixel_values": draw.floats(n, 2, channels, size, size), "image_sizes": sizes}
            yield {"pixel_values": draw.floats(n, channels, size, size), "image_sizes": sizes}
        if "aspect_ratio_ids" in names:
            ones = torch.ones(n, 1, dtype=torch.long)
            tiles = _first(config, "max_num_tiles") or 4
            yield {
                "pixel_values": draw.floats(n, 1, tiles, channels, size, size),
                "aspect_ratio_ids": ones,
                "aspect_ratio_mask": torch.ones(n, 1, tiles, dtype=torch.long),
                "cross_attention_mask": torch.ones(n, LENGTH, 1, tiles, dtype=torch.long),
            }
        if "image_attention_mask" in names:
            mask = torch.ones(n, LENGTH, 1, dtype=torch.long)
            yield {"pixel_values": draw.floats(n, 1, channels, size, size), "image_attention_mask": mask}
        if "image_embeds_position_mask" in names:
            queries = _first(config, "latent_query_num") or 64
            mask = torch.zeros(n, queries + LENGTH, dtype=torch.long)
            mask[:, :queries] = 1
            yield {
                "pixel_values": draw.floats(n, channels, size, size),
                "input_ids": draw.ids(queries + LENGTH),
                "image_embeds_position_mask": mask,
            }
        for side in dict.fromkeys((size, IMAGE, 64, 224)):
            yield {"pixel_values": draw.floats(n, channels, side, side)}
        yield {"pixel_values": draw.floats(n, _first(config, "num_frames") or 2, channels, size, size)}
        yield {"pixel_values": draw.floats(n, 1, channels, size, size)}
        if "spatial_shapes" in names:
            patch = _first(config, "patch_size") or PATCH
            mask = torch.ones(n, 16, dtype=torch.long)
            yield {
                "pixel_values": draw.floats(n, 16, channels * patch * patch),
                "pixel_attention_mask": mask,
                "spatial_shapes": torch.tensor([[4, 4]] * n),
            }
        if "image_hidden_states" not in names:
            yield {"pixel_values": draw.floats(n, 2, channels, size, size)}
    if {"hidden_states", "grid_thw"} <= names:
        patch = _first(config, "patch_size") or PATCH
        width = channels * (_first(config, "temporal_patch_size") or 1) * patch * patch
        yield {"hidden_states": draw.floats(16 * n, width), "grid_thw": torch.tensor([[1, 4, 4]] * n)}
    if "pixel_values_videos" in names and "pixel_values" not in names:
        yield {
            "pixel_values_videos": draw.floats(
                n, _first(config, "frames_per_clip", "num_frames") or 2, channels, size, size
            )
        }
    if "flattened_patches" in names:
        yield {"flattened_patches": draw.floats(n, 8, 2 + channels * PATCH * PATCH)}


def _sounds(model: PreTrainedModel, names: set[str], draw: _Draw) -> Iterator[Inputs]:
    config, n = model.config, draw.samples
    mels = _first(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_size", "input_dim") or 80
    frames = 2 * (_first(config, "max_source_positions") or 64)
    for name in ("input_features", "input_values", "audio_values", "inputs"):
        if name in names:
            for shape in (
                (n, mels, frames),
                (n, 64, mels),
                (n, 1, 64, mels),
                (n, 1600),
                (n, 1, 1600),
                (n, frames, mels),
            ):
                value = {name: draw.floats(*shape)}
                yield value
                mask = next(
                    (m for m in (f"{name}_mask", "feature_attention_mask", "attention_mask") if m in names), None
                )
                if mask is not None and mask != "attention_mask":
                    yield {**value, mask: torch.ones(n, shape[-1] if shape[1] == mels else shape[1], dtype=torch.long)}


def _image_size(config: PreTrainedConfig) -> int:
    size: Any = _first(config, "image_size", "img_size", kinds=(int, list, tuple))
    return size[0] if isinstance(size, (list, tuple)) else size or IMAGE


def _first(config: PreTrainedConfig, *names: str, kinds: tuple[type, ...] = (int,)) -> Any:
    """A number of that name in the config or in one of its parts."""
    for name in names:
        for section in _sections(config):
            try:
                value = getattr(section, name, None)
            except Exception:
                continue
            if isinstance(value, kinds) and not isinstance(value, bool):
                return value
    return None


def _sections(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for name in sorted(type(config).sub_configs, key=lambda n: "text" in n):
        part = getattr(config, name, None)
        if isinstance(part, PreTrainedConfig):
            yield from _sections(part)


_FEATURES = re.compile(r"tokens:? (\d+).*?features:? (\d+)", re.IGNORECASE | re.DOTALL)


def _with_placeholders(model: PreTrainedModel, inputs: Inputs, error: str) -> Inputs | None:
    """The same with as many image or sound tokens as the error says that there are features; None where it says nothing of them."""
    found = _FEATURES.search(error)
    if found is None or "input_ids" not in inputs or inputs["input_ids"].dim() != 2:
        return None
    kind = "audio" if "audio" in error.lower() else "video" if "video" in error.lower() else "image"
    ids = inputs["input_ids"]
    token = _first(model.config, f"{kind}_token_id", f"{kind}_token_index")
    wanted = int(found[2])
    if int((ids == token).sum()) == wanted and wanted % HIDDEN == 0:
        wanted //= HIDDEN  # some count numbers instead of features
    if token is None or wanted % len(ids) or int((ids == token).sum()) == wanted:
        return None
    plain = ids[:, -LENGTH:].masked_fill(ids[:, -LENGTH:] == token, 9)
    ids = torch.cat([torch.full((len(ids), wanted // len(ids)), token), plain], 1)
    kinds = {"mm_token_type_ids": (ids == token).long()} if "mm_token_type_ids" in _parameters(model) else {}
    return {**inputs, "input_ids": ids, **kinds}


def _parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
