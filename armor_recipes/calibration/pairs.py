"""Rows of a source and a target, as inputs of an encoder and a decoder: padded and cut to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from armor_recipes.calibration.files import Cell, Column, Columns, shown
from armor_recipes.calibration.inputs import TOKENS, Batch, ModelInputs
from armor_recipes.calibration.text import is_empty
from armor_recipes.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MASK, ANSWER, ANSWER_MASK = "attention_mask", "decoder_input_ids", "decoder_attention_mask"


@dataclass(frozen=True, slots=True)
class Pair:
    """What an encoder reads, and what the decoder writes."""

    source: str
    target: str


def pair_columns(source: str, target: str) -> Columns:
    """The two columns that pairs are read from."""
    return Columns((Column(source, "source_column"), Column(target, "target_column")))


def pair_of(cell: Cell) -> Pair | None:
    """The row's pair; None where a part is null or nothing but white space. Raises InputError for what is not text."""
    assert isinstance(cell.value, tuple)
    texts = [_text(value, cell.where, key) for value, key in zip(cell.value, ("source", "target"), strict=True)]
    return None if any(map(is_empty, texts)) else Pair(*texts)


def load_pairs(
    pairs: Sequence[Pair], inputs: ModelInputs, tokenizer: PreTrainedTokenizerBase | None, length: int
) -> tuple[Batch, int]:
    """Named tensors `(N, length)` of pairs, and how many of them had a part that was longer and was cut.

    `input_ids` are the tokenizer's for the source, with its special tokens, `decoder_input_ids` those of the target behind the id
    that the decoder starts with; both are filled up with padding, which the masks leave out.

    Raises:
        InputError: the model has no encoder and decoder, or its tokenizer no padding; an id is not in the vocabulary.

    """
    made = _checked(inputs, tokenizer)
    assert inputs.decoder_start is not None
    sources, targets = ([getattr(pair, part) for pair in pairs] for part in ("source", "target"))
    options = {"padding": "max_length", "truncation": True, "max_length": length, "return_tensors": "pt"}
    read, written = made(sources, **options), made(text_target=targets, **options)
    full = ((read[MASK].sum(1) == length) | (written[MASK].sum(1) == length)).nonzero().flatten().tolist()
    cut = sum(_is_longer(pairs[place], made, length) for place in full)
    start = torch.full((len(pairs), 1), inputs.decoder_start)
    tensors = {
        TOKENS: read[TOKENS],
        MASK: read[MASK],
        ANSWER: torch.cat([start, written[TOKENS][:, :-1]], dim=1),
        ANSWER_MASK: torch.cat([torch.ones_like(start), written[MASK][:, :-1]], dim=1),
    }
    return tensors, cut


def _is_longer(pair: Pair, tokenizer: PreTrainedTokenizerBase, length: int) -> bool:
    """Whether a part has more tokens than are taken."""
    read, written = tokenizer(pair.source, verbose=False), tokenizer(text_target=pair.target, verbose=False)
    return max(len(read[TOKENS]), len(written[TOKENS])) > length


def _checked(inputs: ModelInputs, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerBase:
    """The tokenizer. Raises InputError where pairs cannot be used."""
    if not inputs.encoder_decoder or (inputs.arguments and not {TOKENS, ANSWER} <= set(inputs.arguments)):
        raise InputError(
            f"{inputs.name} is no encoder and decoder of text, so that it reads no pairs; take `source_column` and `target_column` "
            "out, and give what it reads"
        )
    if inputs.decoder_start is None:
        raise InputError(
            f"{inputs.name}: its config.json names no decoder_start_token_id, so that what its decoder reads is not known; add it, "
            "or give a .safetensors file of inputs"
        )
    if tokenizer is None or tokenizer.pad_token_id is None:
        what = "the model has no tokenizer" if tokenizer is None else "the tokenizer has no padding token"
        raise InputError(f"{what}, so that pairs cannot be used; add one, or give a .safetensors file of inputs")
    return tokenizer


def _text(value: object, where: str, part: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InputError(f"{where}: the {part} column holds {shown(value)}, not text; name another `{part}_column`")
    return value
