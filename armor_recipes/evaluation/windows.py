"""Windows of held-out text, and which of their tokens each predicts.

As they are by themselves: contiguous, L tokens each, without overlap; each predicts its L−1 tokens after the first, and begins
with the special tokens that the tokenizer puts before a text. The tail of the text is dropped.

With a stride, each begins so many tokens after the one before, and predicts what no earlier one has, to the end of the text.

Rolling, as lm-eval does: each row of the dataset is a text, as the tokenizer writes it. Before it stands one token that is not
predicted, that for the beginning of a text or else its end. L tokens at a time are predicted, each once, from the one token
before them; the last ones of a text from as many as make L.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armor_recipes.calibration.encoding import encoded, special_ends
from armor_recipes.calibration.inputs import TOKENS, InputSet, Source, hash_tokens
from armor_recipes.calibration.text import is_empty, load_documents, no_text
from armor_recipes.calibration.windows import check_vocabulary, pack, window_prefix, with_prefix
from armor_recipes.errors import InputError
from armor_recipes.recipe.schema import AtMost, Bos, PerplexitySpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: A window, and the place of its first target.
Cut = tuple[Tensor, int]


@dataclass(frozen=True, slots=True, eq=False)
class TextWindows(InputSet):
    """Windows `(N, L)`; `spans` `(N, 2)` int64 are the places of each one's first target and behind its last.

    Without `spans` all after the first are. `tokens_per` are the tokens that the text has for a word (what white space divides,
    as lm-eval counts) and for a byte of UTF-8.
    """

    spans: Tensor | None = None
    tokens_per: tuple[float, float] = (1.0, 1.0)

    @property
    def targets(self) -> tuple[int, ...]:
        """How many tokens each window predicts."""
        if self.spans is None:
            return (self.ids.shape[1] - 1,) * len(self)
        return tuple((self.spans[:, 1] - self.spans[:, 0]).tolist())


def evaluation_windows(
    spec: PerplexitySpec, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int | None = None
) -> TextWindows:
    """Cut the first `spec.windows` windows (None: all) from the text: its rows, empty ones too, joined by `spec.separator`.

    Each begins with what `spec.bos` says. Raises InputError if the dataset cannot be read or is too short, or has an id that
    is not below `vocab_size`.
    """
    texts, documents, empty = _texts(spec)
    every: Bos = "auto" if spec.bos == "auto" and spec.documents == "joined" else "never"
    prefix = window_prefix(every, tokenizer, length=spec.sequence_length, vocab_size=vocab_size)
    streams = _streams(spec, texts, tokenizer, prefix)
    tokens = sum(map(len, streams))
    if vocab_size is not None:
        check_vocabulary(torch.cat(list(streams)), vocab_size, spec.dataset)
    ids, spans = _cut(spec, streams, prefix, tokenizer)
    taken = _taken(spec, len(ids), tokens)
    ids, spans = ids[:taken].clone(), None if spans is None else spans[:taken]
    source = Source(spec.dataset, documents, empty, tokens, len(ids), taken)
    per = tokens / sum(map(_words, texts)), tokens / sum(len(text.encode()) for text in texts)
    sha256 = hash_tokens(ids if spans is None else torch.cat([ids, spans], 1))
    return TextWindows({TOKENS: ids}, sha256, taken, (source,), (0,) * taken, prefix, spans=spans, tokens_per=per)


def _texts(spec: PerplexitySpec) -> tuple[Sequence[str], int, int]:
    """The texts, and how many of the rows have some and are empty; of joined ones the rows themselves are not kept."""
    rows = load_documents(spec.dataset, split=spec.split, text_column=spec.text_column).rows[: spec.rows]
    empty = sum(map(is_empty, rows))
    if empty == len(rows):
        raise no_text(spec.dataset, empty, None)
    return rows if spec.documents == "rolling" else (spec.separator.join(rows),), len(rows) - empty, empty


def _words(text: str) -> int:
    """As lm-eval counts them: white space at either end has an empty word before or behind it."""
    return len(re.split(r"\s+", text))


def _streams(
    spec: PerplexitySpec, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, prefix: tuple[int, ...]
) -> list[Tensor]:
    """The ids `(T,)` of each text, as the tokenizer writes them where not every window begins so, or `bos` is `never`."""
    found = [torch.from_numpy(ids).long() for ids in encoded(texts, tokenizer, end=False, prefix=prefix)]
    if tokenizer is None or not (spec.bos == "once" or (spec.bos == "auto" and spec.documents == "rolling")):
        return found
    head, tail = (torch.tensor(ids, dtype=torch.int64) for ids in special_ends(tokenizer))
    return [torch.cat([head, ids, tail]) for ids in found]


def _cut(
    spec: PerplexitySpec, streams: Sequence[Tensor], prefix: tuple[int, ...], tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Tensor, Tensor | None]:
    """All windows `(N, L)`, and where not all of their tokens after the first are targets, the spans of those `(N, 2)`."""
    length = spec.sequence_length
    if spec.documents == "rolling":
        first = _first_id(tokenizer, spec.dataset)
        return _filled([cut for stream in streams for cut in _rolling(torch.cat([first, stream]), length)], length + 1)
    (stream,) = streams
    body = length - len(prefix)
    if spec.stride is None:
        return with_prefix(pack(stream, body), prefix, length), None
    if spec.stride > body:
        raise InputError(
            f"`stride` {spec.stride} leaves out text between windows that hold {body} tokens of it; lower it"
        )
    head = torch.tensor(prefix, dtype=torch.int64)
    return _filled(
        [(torch.cat([head, ids]), max(1, len(head) + new)) for ids, new in _strided(stream, body, spec.stride)], length
    )


def _first_id(tokenizer: PreTrainedTokenizerBase | None, dataset: str) -> Tensor:
    """`(1,)`: what the first token of a text is predicted from. Raises InputError where the tokenizer has no such token."""
    assert tokenizer is not None, "without one there are no ids"
    found = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if found is None:
        raise InputError(
            f"{dataset}: the tokenizer has no token for the beginning of a text and none for its end, from which "
            "`documents: rolling` predicts the first token; use `documents: joined`"
        )
    return torch.tensor([found])


def _rolling(stream: Tensor, length: int) -> Iterator[Cut]:
    """Windows of the ids of a text `(1 + T,)`, the first of which is no target."""
    for start in range(1, len(stream), length):
        stop = min(start + length, len(stream))
        begin = max(0, stop - length - 1)
        yield stream[begin:stop], start - begin


def _strided(stream: Tensor, length: int, stride: int) -> Iterator[Cut]:
    """Windows of a text `(T,)`; the last one reaches its end. What is new in the first is all."""
    stop = 0
    for begin in range(0, len(stream), stride):
        if stop == len(stream):
            return
        new, stop = stop - begin, min(begin + length, len(stream))
        yield stream[begin:stop], new


def _filled(cuts: Sequence[Cut], width: int) -> tuple[Tensor, Tensor]:
    """Windows `(N, width)`, filled up behind with an id that no target before it can see, and their spans `(N, 2)`."""
    cuts = [(ids, first) for ids, first in cuts if first < len(ids)]
    windows = torch.zeros(len(cuts), width, dtype=torch.int64)
    for place, (ids, _) in enumerate(cuts):
        windows[place, : len(ids)] = ids
    return windows, torch.tensor([[first, len(ids)] for ids, first in cuts], dtype=torch.int64).view(-1, 2)


def _taken(spec: PerplexitySpec, available: int, tokens: int) -> int:
    """How many windows are measured. Raises InputError where there are fewer than asked for."""
    asked = available if spec.windows is None else spec.windows
    taken = min(asked.at_most, available) if isinstance(asked, AtMost) else asked
    if not 1 <= taken <= available:
        raise InputError(
            f"{spec.dataset} has {available} windows of {spec.sequence_length} tokens ({tokens} tokens), but "
            f"{max(1, taken)} are needed to measure perplexity; name more text, a smaller `sequence_length` or fewer `windows`"
        )
    return taken
