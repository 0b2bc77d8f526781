"""Ids of texts. A long text is encoded in pieces, because a tokenizer's bookkeeping takes some 160 bytes a byte of text."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from armor_recipes.calibration.text import RANDOM_TOKENS
from armor_recipes.errors import InputError

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

Ids = NDArray[np.int32]

#: Documents handed to the tokenizer at once.
_BATCH = 512
#: Characters handed to the tokenizer at once, but for one longer document of a slow tokenizer.
_PIECE = 1 << 18
#: Characters that a piece is encoded with on each side and that do not count; half of them must agree with the neighbour.
_CONTEXT = 2048
#: Texts on which a tokenizer shows its special tokens; each may be unknown to some.
_PROBES = ("a", "A", "0", "的")


def encode(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, *, end: bool, prefix: tuple[int, ...] = ()
) -> Tensor:
    """Join all texts into one stream of ids `(T,)` int64. Arguments and errors are those of `encoded`."""
    return join(encoded(texts, tokenizer, end=end, prefix=prefix))


def join(parts: Iterable[Ids]) -> Tensor:
    """One stream `(T,)` int64 of all ids."""
    return torch.from_numpy(np.concatenate([np.empty(0, np.int32), *parts], dtype=np.int64))


def encoded(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase | None, *, end: bool, prefix: tuple[int, ...] = ()
) -> Iterator[Ids]:
    """Ids `(T,)` of each text, which is read as they are asked for; with `end` they end with the end-of-text id.

    No other special token is added, and none by a tokenizer that has no end-of-text token. Where a text's ids begin with
    `prefix`, that is left out, since every window brings it. Raises InputError without a tokenizer.
    """
    if tokenizer is None:
        raise InputError(
            f"the model has no tokenizer, so that text cannot be used; add one, or, to calibrate, name {RANDOM_TOKENS}"
        )
    eos = tokenizer.eos_token_id if end else None
    tail = np.array([] if eos is None else [eos], dtype=np.int32)
    return (np.append(_without(ids, prefix), tail) for ids in _encoded(texts, tokenizer))


def special_ends(tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that the tokenizer by itself puts before every text (normally one beginning-of-text token, or none) and after it.

    Raises InputError if they cannot be told from the text's own.
    """
    for probe in _PROBES:
        plain, full = _probe(tokenizer, probe, special=False), _probe(tokenizer, probe, special=True)
        if full == plain:
            return (), ()
        places = [i for i in range(len(full)) if plain and full[i : i + len(plain)] == plain]
        if places:
            return tuple(full[: places[0]]), tuple(full[places[0] + len(plain) :])
    raise InputError(
        f"the tokenizer writes {probe!r} as {full} with its special tokens and as {plain} without them, so that those before a "
        "text cannot be told; write `bos: never`"
    )


def _probe(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    return [int(i) for i in tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]]


def _without(ids: Ids, prefix: tuple[int, ...]) -> Ids:
    return ids[len(prefix) :] if prefix == tuple(ids[: len(prefix)].tolist()) else ids


def _encoded(texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[Ids]:
    for batch in _batches(texts):
        if len(batch[0]) > _PIECE and tokenizer.is_fast:
            yield encode_in_pieces(batch[0], tokenizer)
        else:
            yield from (np.array(ids, dtype=np.int32) for ids in _call(tokenizer, batch)["input_ids"])


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """All texts in order, at most `_BATCH` and about `_PIECE` characters at once; a longer text comes alone."""
    batch: list[str] = []
    size = 0
    for text in texts:
        if batch and (len(batch) == _BATCH or size + len(text) > _PIECE):
            yield batch
            batch, size = [], 0
        batch.append(text)
        size += len(text)
    if batch:
        yield batch


def _call(tokenizer: PreTrainedTokenizerBase, batch: list[str]) -> BatchEncoding[Any]:
    # verbose=False: a document may well be longer than the model's context; it is cut into windows afterwards
    encoding: BatchEncoding[Any] = tokenizer(
        batch, add_special_tokens=False, truncation=False, padding=False, return_attention_mask=False, verbose=False
    )
    return encoding


@dataclass(frozen=True, slots=True, eq=False)
class _Edge:
    """Tokens near one end of a piece: `rows` `(K, 4)` of id, begin and end in the text, and whether it starts a word.

    `at` is the place of the first of them among the piece's ids.
    """

    at: int
    rows: NDArray[np.int64]


@dataclass(slots=True, eq=False)
class _Piece:
    """Ids `(T,)` of `text[start:stop]` and some context; those of the text itself are `ids[first:last]`."""

    start: int
    stop: int
    ids: Ids
    head: _Edge
    tail: _Edge
    first: int = 0
    last: int | None = None


def encode_in_pieces(
    text: str, tokenizer: PreTrainedTokenizerBase, *, size: int = _PIECE, context: int = _CONTEXT
) -> Ids:
    """Ids `(T,)` of a long text, the same as those of the whole, by a fast tokenizer; `size` is at least `context`.

    Each piece is encoded with context on both sides. Two neighbours are joined between two tokens where, all over the middle
    half of what they share, they have the same tokens at the same places and begin the same words (what the tokenizer's
    model gets one by one). The join is at the start of a word, which makes both sides independent. Where one word covers it
    all, BPE alone may be cut inside: its result is right as soon as any two neighbouring tokens stay two when encoded
    together, and each two stand next to each other in one of the pieces. Neighbours that do not agree are encoded again as
    one, together with as much text as makes it at least twice as long.
    """
    inside = _cuts_words(tokenizer)
    pieces: list[_Piece] = []
    while not pieces or pieces[-1].stop < len(text):
        start = pieces[-1].stop if pieces else 0
        piece = _encode_piece(text, tokenizer, (start, start + size), context)
        while pieces and not _join(pieces[-1], piece, inside=inside):
            piece = _encode_piece(text, tokenizer, _wider(pieces, piece), context)
        pieces.append(piece)
    return np.concatenate([piece.ids[piece.first : piece.last] for piece in pieces])


def _cuts_words(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the inside of a word is the same wherever the text around it was cut."""
    from tokenizers import models, pre_tokenizers

    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.model, models.BPE):
        return False
    # A character that is neither known nor written as unknown is dropped, and those after it get the wrong places.
    letters = pre_tokenizers.ByteLevel.alphabet()
    known = backend.model.unk_token is not None or all(backend.token_to_id(letter) is not None for letter in letters)
    return known and (
        backend.pre_tokenizer is None or _splits_locally(json.loads(backend.pre_tokenizer.__getstate__()))
    )


def _splits_locally(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether words end where the next few characters say so. A regular expression may have begun long before."""
    match pre_tokenizer:
        case {"type": "Sequence", "pretokenizers": list(steps)}:
            return all(map(_splits_locally, steps))
        case {"type": "Split", "pattern": pattern}:
            return "String" in pattern
        case _:
            return pre_tokenizer["type"] in ("ByteLevel", "Metaspace")


def _encode_piece(text: str, tokenizer: PreTrainedTokenizerBase, place: tuple[int, int], context: int) -> _Piece:
    start, stop = place[0], min(place[1], len(text))
    begin = max(0, start - context)
    encoding = _call(tokenizer, [text[begin : stop + context]])[0]
    words = np.array(encoding.word_ids, dtype=np.int64)
    spans = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) + begin
    ids = np.array(encoding.ids, dtype=np.int32)
    rows = np.column_stack([ids, spans, np.diff(words, prepend=-1) != 0])
    return _Piece(start, stop, ids, _edge(rows, start, context // 2), _edge(rows, stop, context // 2))


def _edge(rows: NDArray[np.int64], cut: int, reach: int) -> _Edge:
    first = int(np.searchsorted(rows[:, 1], cut - reach))
    last = int(np.searchsorted(rows[:, 2], cut + reach, side="right"))
    return _Edge(first, rows[first:last].copy())


def _join(left: _Piece, right: _Piece, *, inside: bool) -> bool:
    """Set where `left` ends and `right` begins, the same place in both; False if there is none."""
    rows = left.tail.rows
    if not np.array_equal(rows, right.head.rows):
        return False
    words = np.flatnonzero(rows[1:, 3]) + 1
    places = np.arange(1, len(rows)) if inside and not len(words) else words
    if not len(places):
        return False
    place = int(places[np.abs(rows[places, 1] - right.start).argmin()])
    left.last, right.first = left.tail.at + place, right.head.at + place
    return True


def _wider(pieces: list[_Piece], piece: _Piece) -> tuple[int, int]:
    """Take pieces from the end until they are as long as `piece`; return where they start, and as far to the other side."""
    start = piece.start
    while pieces and piece.start - start < piece.stop - piece.start:
        start = pieces.pop().start
    return start, max(piece.stop, 2 * piece.start - start)
