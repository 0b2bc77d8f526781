"""The windows that a dataset gives, or the first of them that a stream's documents make."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from armor_recipes.calibration.encoding import Ids, encoded, join
from armor_recipes.calibration.stream import open_stream
from armor_recipes.calibration.text import BUILTIN, RANDOM_TOKENS, load_documents, local_path, no_text
from armor_recipes.calibration.windows import check_vocabulary, pack
from armor_recipes.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Characters for each token of a window, of which a document's beginning or a part of a stream's document has as many at most.
_CHARACTERS = 16
#: Documents in a row that may be too short before a stream is read no further.
_TOO_SHORT = 4096


@dataclass(frozen=True, slots=True)
class Part:
    """One dataset of a calibration, complete; `stream` is None where the kind of dataset decides."""

    dataset: str
    weight: float
    split: str
    text_column: str
    messages_column: str | None
    stream: bool | None


@dataclass(frozen=True, slots=True)
class Rule:
    """How windows are made: `length` tokens that begin with `prefix`, every id below `vocab_size`; `seed` orders a stream."""

    length: int
    prefix: tuple[int, ...]
    documents: Literal["packed", "truncated"]
    seed: int
    vocab_size: int

    @property
    def room(self) -> int:
        """Tokens of text in a window."""
        return self.length - len(self.prefix)

    @property
    def characters(self) -> int:
        """Characters of a document that make a few windows."""
        return _CHARACTERS * self.length


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Windows of one dataset `(N, room)`; None for random tokens, of which there is no end. Counts are as in `Source`."""

    dataset: str
    windows: Tensor | None
    documents: int = 0
    empty: int = 0
    short: int = 0
    tokens: int = 0
    stream: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    windows: Tensor
    tokens: int
    short: int = 0


def open_pool(part: Part, tokenizer: PreTrainedTokenizerBase | None, rule: Rule, needed: int) -> Pool:
    """Make all windows of a dataset, or of a stream the first `needed` and no more.

    Raises InputError if the dataset cannot be read or makes no window, or the tokenizer does not fit the model.
    """
    if part.dataset == RANDOM_TOKENS:
        return Pool(part.dataset, None)
    pool = _streamed(part, tokenizer, rule, needed) if _is_stream(part) else _whole(part, tokenizer, rule)
    assert pool.windows is not None
    if not len(pool.windows):
        raise _no_window(pool, rule)
    return pool


def _is_stream(part: Part) -> bool:
    """What the part says; else, whether it is a hub id."""
    if part.stream is not None:
        return part.stream
    return not part.dataset.startswith(BUILTIN) and local_path(part.dataset) is None


def _whole(part: Part, tokenizer: PreTrainedTokenizerBase | None, rule: Rule) -> Pool:
    found = load_documents(
        part.dataset,
        split=part.split,
        text_column=part.text_column,
        messages_column=part.messages_column,
        tokenizer=tokenizer,
    )
    texts: Sequence[str] = found.documents
    if rule.documents == "truncated":
        texts = [text[: rule.characters] for text in texts]
    cut = _cut([texts], tokenizer, rule, part.dataset, None)
    return Pool(part.dataset, cut.windows, len(texts), found.empty, cut.short, cut.tokens)


def _streamed(part: Part, tokenizer: PreTrainedTokenizerBase | None, rule: Rule, needed: int) -> Pool:
    stream = open_stream(
        part.dataset,
        split=part.split,
        text_column=part.text_column,
        messages_column=part.messages_column,
        tokenizer=tokenizer,
        longest=rule.characters,
        beginnings=rule.documents == "truncated",
    )
    cut = _cut(stream.batches(rule.seed), tokenizer, rule, part.dataset, needed)
    if not stream.documents:
        raise no_text(f"{part.dataset}, as far as it was read,", stream.empty, part.messages_column)
    return Pool(part.dataset, cut.windows, stream.documents, stream.empty, cut.short, cut.tokens, stream=True)


def _cut(
    batches: Iterable[Sequence[str]],
    tokenizer: PreTrainedTokenizerBase | None,
    rule: Rule,
    dataset: str,
    needed: int | None,
) -> _Cut:
    """Cut windows from documents, read batch by batch until there are as many as are needed (None: all)."""
    ids = (ids for texts in batches for ids in encoded(texts, tokenizer, end=True, prefix=rule.prefix))
    if rule.documents == "truncated":
        return _beginnings(ids, rule, dataset, needed)
    stream = join(ids if needed is None else _first(ids, needed * rule.room))
    check_vocabulary(stream, rule.vocab_size, dataset)
    return _Cut(pack(stream, rule.room), len(stream))


def _first(parts: Iterable[Ids], count: int) -> Iterator[Ids]:
    """The first `count` ids."""
    for ids in parts:
        yield ids[:count]
        count -= len(ids)
        if count <= 0:
            return


def _beginnings(documents: Iterable[Ids], rule: Rule, dataset: str, needed: int | None) -> _Cut:
    """The first ids of each document that has enough; others are counted. A stream may end for too many in a row."""
    rows: list[Ids] = []
    short = in_a_row = 0
    for ids in documents:
        if len(ids) >= rule.room:
            rows.append(ids[: rule.room].copy())
            in_a_row = 0
        else:
            short += 1
            in_a_row += 1
        if needed is not None and (len(rows) == needed or in_a_row == _TOO_SHORT):
            break
    windows = join(rows).view(len(rows), rule.room)
    check_vocabulary(windows, rule.vocab_size, dataset)
    return _Cut(windows, windows.numel(), short)


def _no_window(pool: Pool, rule: Rule) -> InputError:
    if rule.documents == "truncated":
        return InputError(
            f"{pool.dataset} has no document of {rule.length} tokens or more ({pool.short} are shorter); name longer ones, a "
            "smaller `sequence_length`, or `documents: packed`"
        )
    return InputError(
        f"{pool.dataset} has only {pool.tokens} tokens, less than one window; "
        f"name more text, or a `sequence_length` smaller than {rule.length}"
    )
