"""Inputs for a model of any family: named tensors, found by its forward's signature and by trying."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from tests.support.families import HIDDEN, IMAGE, PATCH

SAMPLES, LENGTH = 2, 16
Inputs = dict[str, Any]


def inputs_for(model: PreTrainedModel, samples: int = SAMPLES) -> Inputs:
    """Random named tensors that the model's forward takes, with images and sounds where it can. ValueError says what was tried."""
    reasons: list[str] = []
    for candidate in _candidates(model, samples):
        inputs: Inputs | None = candidate
        for _ in range(4):
            if inputs is None:
                break
            try:
                with torch.no_grad():
                    first_tensor(model(**inputs))
            except Exception as error:  # whatever the family's code meets first
                reasons.append(f"{sorted(inputs)}: {type(error).__name__}: {' '.join(str(error).split())[-160:]}")
                inputs = _with_placeholders(model, inputs, str(error))
            else:
                return inputs
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


@dataclass(frozen=True, slots=True)
class _Images:
    """What a model's images look like."""

    draw: _Draw
    names: set[str]
    channels: int
    size: int
    patch: int
    frames: int
    tiles: int
    queries: int
    depth: int

    @classmethod
    def of(cls, model: PreTrainedModel, draw: _Draw) -> _Images:
        config = model.config
        return cls(
            draw,
            _parameters(model),
            channels=_first(config, "num_channels", "in_channels") or 3,
            size=_image_size(config),
            patch=_first(config, "patch_size") or PATCH,
            frames=_first(config, "frames_per_clip", "num_frames") or 2,
            tiles=_first(config, "max_num_tiles") or 4,
            queries=_first(config, "latent_query_num") or 64,
            depth=_first(config, "temporal_patch_size") or 1,
        )

    def plain(self, *before: int, side: int | None = None) -> Tensor:
        """Images `(N, …, C, H, W)`."""
        side = side or self.size
        return self.draw.floats(self.draw.samples, *before, self.channels, side, side)

    def patches(self) -> Tensor:
        """All patches below each other, 16 of each image."""
        return self.draw.floats(16 * self.draw.samples, self.channels * self.depth * self.patch**2)

    def same(self, *numbers: int) -> Tensor:
        """These numbers for each sample."""
        return torch.tensor([numbers] * self.draw.samples)

    def ones(self, *shape: int) -> Tensor:
        """A mask that hides nothing."""
        return torch.ones(self.draw.samples, *shape, dtype=torch.long)


def _pictures(model: PreTrainedModel, names: set[str], draw: _Draw) -> Iterator[Inputs]:
    images = _Images.of(model, draw)
    if "pixel_values" in names:
        yield from _with_grids(images)
        yield from _with_masks(images)
        for side in dict.fromkeys((images.size, IMAGE, 64, 224)):
            yield {"pixel_values": images.plain(side=side)}
        for before in (images.frames, 1, 2):
            yield {"pixel_values": images.plain(before)}
    if {"hidden_states", "grid_thw"} <= names:
        yield {"hidden_states": images.patches(), "grid_thw": images.same(1, 4, 4)}
    if "pixel_values_videos" in names and "pixel_values" not in names:
        yield {"pixel_values_videos": images.plain(images.frames)}
    if "flattened_patches" in names:
        yield {"flattened_patches": _numbered_patches(images)}


def _with_grids(images: _Images) -> Iterator[Inputs]:
    """Patches of images and how many there are in each direction."""
    for grid in ("image_grid_thw", "grid_thw"):
        if grid in images.names:
            yield {"pixel_values": images.patches(), grid: images.same(1, 4, 4)}
            single = images.draw.floats(16 * images.draw.samples, images.channels, images.patch, images.patch)
            yield {"pixel_values": single, grid: images.same(1, 4, 4)}
    if "image_sizes" in images.names:
        sizes = {"image_sizes": images.same(images.size, images.size)}
        yield {"pixel_values": images.plain(2), **sizes}
        yield {"pixel_values": images.plain(), **sizes}
    if "spatial_shapes" in images.names:
        flat = images.draw.floats(images.draw.samples, 16, images.channels * images.patch**2)
        yield {"pixel_values": flat, "pixel_attention_mask": images.ones(16), "spatial_shapes": images.same(4, 4)}


def _with_masks(images: _Images) -> Iterator[Inputs]:
    """Images and which tokens look at them."""
    if "aspect_ratio_ids" in images.names:
        yield {
            "pixel_values": images.plain(1, images.tiles),
            "aspect_ratio_ids": images.ones(1),
            "aspect_ratio_mask": images.ones(1, images.tiles),
            "cross_attention_mask": images.ones(LENGTH, 1, images.tiles),
        }
    if "image_attention_mask" in images.names:
        yield {"pixel_values": images.plain(1), "image_attention_mask": images.ones(LENGTH, 1)}
    if "image_embeds_position_mask" in images.names:
        length = images.queries + LENGTH
        mask = torch.zeros(images.draw.samples, length, dtype=torch.long)
        mask[:, : images.queries] = 1
        ids = images.draw.ids(length)
        yield {"pixel_values": images.plain(), "input_ids": ids, "image_embeds_position_mask": mask}


def _numbered_patches(images: _Images) -> Tensor:
    """Eight patches `(N, 8, 2 + C·P²)`, each after its row and column."""
    places = torch.tensor([[row, column] for row in (1, 2) for column in (1, 2, 3, 4)], dtype=torch.float32)
    values = images.draw.floats(images.draw.samples, 8, images.channels * PATCH**2)
    return torch.cat([places.expand(images.draw.samples, -1, -1), values], -1)


def _sounds(model: PreTrainedModel, names: set[str], draw: _Draw) -> Iterator[Inputs]:
    config, n = model.config, draw.samples
    mels = _first(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "input_size", "input_dim") or 80
    frames = 2 * (_first(config, "max_source_positions") or 64)
    shapes = ((n, mels, frames), (n, 64, mels), (n, 1, 64, mels), (n, 1600), (n, 1, 1600), (n, frames, mels))
    for name in sorted(names & {"input_features", "input_values", "audio_values", "inputs"}):
        mask = next((m for m in (f"{name}_mask", "feature_attention_mask") if m in names), None)
        for shape in shapes:
            value = {name: draw.floats(*shape)}
            yield value
            if mask is not None:
                length = shape[-1] if shape[1] == mels else shape[1]
                yield {**value, mask: torch.ones(n, length, dtype=torch.long)}


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
    named = ("mm_token_type_ids", "moe_mm_token_type_ids")
    kinds = {name: (ids == token).long() for name in named if name in _parameters(model)}
    return {**inputs, "input_ids": ids, **kinds}


def _parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)
