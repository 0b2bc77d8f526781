"""Which rows of an activation are of padding, and of no token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from armor_recipes.calibration.inputs import TOKENS, Batch
from armor_recipes.model.calls import LayerCall

#: What a block's positions are: of the text that the model reads, of the text that its decoder writes, or of something else.
Reads = Literal["text", "decoded", "other"]
_MASK, _DECODER_MASK, _DECODED = "attention_mask", "decoder_attention_mask", "decoder_input_ids"
_TEXT_INPUTS = (TOKENS, "inputs_embeds", _DECODED)


@dataclass(frozen=True, slots=True)
class Padding:
    """The tokens that count, of one batch at one block.

    `masks` has for `(B, L)` a boolean mask of that shape, True for a token, or None where all of them are; `beside` are arguments
    of the block whose positions are an encoder's, with `encoder` their mask.
    """

    masks: Mapping[tuple[int, ...], Tensor | None]
    beside: tuple[Tensor, ...] = ()
    encoder: Tensor | None = None

    def mask_of(self, x: Tensor) -> Tensor | None:
        """The mask `(B, L)` of activations `(B, L, …)`; None where all their rows count."""
        if x.ndim < 3:
            return None
        if self.encoder is not None and x.shape[:2] == self.encoder.shape and any(x is other for other in self.beside):
            return self.encoder
        return self.masks.get(tuple(x.shape[:2]))

    def pieces(self, x: Tensor, like: Tensor | None = None) -> Iterator[Tensor]:
        """The rows of activations `(B, L, I)` that count: all at once, or where some do not, window by window as `(1, T, I)`.

        Of rows without windows `(T, I)` all, unless there are as many as the batch has tokens: an expert's are tokens of its own
        choice. With `like` those of other activations of the same tokens.
        """
        mask = self.mask_of(x if like is None else like)
        if mask is None and x.ndim == 2:
            own = next((m for m in self.masks.values() if m is not None and m.numel() == len(x)), None)
            yield x if own is None else x[own.flatten()]
        elif mask is None:
            yield x
        else:
            for window, kept in zip(x, mask, strict=True):
                yield window[kept][None]

    def kept(self, x: Tensor, windows: slice = slice(None)) -> Tensor:
        """Outputs `(B, L, …)` of some windows of the batch; where there is padding, `(T, …)` without it."""
        if x.ndim < 3:
            return x
        masks = (mask for shape, mask in self.masks.items() if mask is not None and shape[1] == x.shape[1])
        mask = next((mask[windows] for mask in masks if len(mask[windows]) == len(x)), None)
        return x if mask is None else x[mask]


NO_PADDING = Padding({})


def reads_of(model: nn.Module, block: str, batch: Batch) -> Reads:
    """What a block's positions are, by the transformers model that it is in: a tower's are patches, an encoder's what is read."""
    inside = [part for name, part in _models(model) if name and f"{block}.".startswith(f"{name}.")]
    if inside and inside[-1] not in _TEXT_INPUTS:
        return "other"
    if _DECODED not in batch:
        return "text"
    find = getattr(model, "get_encoder", None)
    encoder = find() if find is not None else None
    return "text" if encoder is not None and model.get_submodule(block) in set(encoder.modules()) else "decoded"


def has_masks(batch: Batch) -> bool:
    """Whether a batch's tensors tell tokens from padding."""
    return _MASK in batch or _DECODER_MASK in batch


def padding_of(batch: Batch, reads: Reads, call: LayerCall) -> Padding:
    """The padding of a batch, as the masks `(B, L)` among its tensors tell it, at a block that is called with `(B, L, H)`."""
    read, written = (_mask(batch, name) for name in (_MASK, _DECODER_MASK))
    if reads == "other" or (read is None and written is None):
        return NO_PADDING
    first, ids = (written, batch.get(_DECODED)) if reads == "decoded" else (read, batch.get(TOKENS))
    shape = None if ids is None and first is None else tuple((ids if first is None else first).shape)  # type: ignore[union-attr]
    if shape != tuple(call.hidden.shape[:2]) or call.hidden.ndim < 3:
        return NO_PADDING
    masks = {} if read is None else {tuple(read.shape): _some(read)}
    return Padding({**masks, shape: _some(first)}, tuple(call.tensors()), _some(read) if reads == "decoded" else None)


def written_or_read(batch: Batch) -> Reads:
    """What the positions of a model's own output are, where they are those of text."""
    return "decoded" if _DECODED in batch else "text"


def kept_of(batch: Batch, reads: Reads, x: Tensor) -> Tensor:
    """Outputs `(B, L, …)` for a batch; where there is padding, `(T, …)` without it."""
    return padding_of(batch, reads, LayerCall(x, (), {})).kept(x)


def _mask(batch: Batch, name: str) -> Tensor | None:
    mask = batch.get(name)
    return mask.to(torch.bool) if mask is not None and mask.ndim == 2 else None


def _some(mask: Tensor | None) -> Tensor | None:
    """The mask, where it leaves something out."""
    return None if mask is None or bool(mask.all()) else mask


def _models(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Names of modules that have a main input of their own, with its name, outermost first."""
    for name, module in model.named_modules():
        found = getattr(module, "main_input_name", None)
        if isinstance(found, str):
            yield name, found
