"""Windows of tokens, chosen by a seed and hashed. `docs/calibration.md` states the rule."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from armor_recipes.calibration.encoding import encode, special_prefix
from armor_recipes.calibration.text import RANDOM_TOKENS, load_documents
from armor_recipes.errors import InputError
from armor_recipes.recipe.schema import Bos, CalibrationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Source:
    """What a token set took of one dataset.

    `documents` and `empty` count rows with and without text, `tokens` all tokens of the dataset (not those that every window
    begins with), `available` the windows they make, `taken` those in the set. For random tokens, `documents` is 0 and the set
    takes all.
    """

    dataset: str
    documents: int
    empty: int
    tokens: int
    available: int
    taken: int


@dataclass(frozen=True, slots=True, eq=False)
class TokenSet:
    """Windows of token ids `(N, L)`, int64, on the CPU; `sha256` is the hash of shape and ids (`hash_tokens`).

    `asked` is the number of windows asked for; N is smaller only where the recipe says `at_most`. `origins` has for each window
    the place of its source in `sources`. `prefix` is what every window begins with, `end_of_text` the id put after each
    document, if any.
    """

    ids: Tensor
    sha256: str
    asked: int
    sources: tuple[Source, ...]
    origins: tuple[int, ...]
    prefix: tuple[int, ...] = ()
    end_of_text: int | None = None

    @property
    def dataset(self) -> str:
        """Names of the datasets, joined by ` + `."""
        return " + ".join(source.dataset for source in self.sources)


@dataclass(frozen=True, slots=True)
class _Part:
    """One dataset of the spec, complete."""

    dataset: str
    weight: float
    split: str
    text_column: str
    messages_column: str | None


@dataclass(frozen=True, slots=True, eq=False)
class _Pool:
    """All windows of one dataset, without their prefix; `windows` is None for random tokens, of which there is no end."""

    dataset: str
    windows: Tensor | None
    documents: int = 0
    empty: int = 0
    tokens: int = 0


def build_tokens(spec: CalibrationSpec, *, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> TokenSet:
    """Choose calibration windows. The same spec, data and tokenizer give the same ids; no global RNG is used.

    Args:
        spec: the `calibration` section, complete.
        tokenizer: the model's; None will do for `builtin:random-tokens`.
        vocab_size: rows of the model's embedding; every id is below it.

    Raises:
        InputError: a dataset cannot be read or is too short, or the tokenizer does not fit the model.

    """
    length = spec.sequence_length
    prefix = window_prefix(spec.bos, tokenizer, length=length, vocab_size=vocab_size)
    parts = _parts(spec)
    pools = [_open(part, tokenizer, prefix, length=length, vocab_size=vocab_size) for part in parts]
    asked = spec.samples if isinstance(spec.samples, int) else spec.samples.at_most
    weights = [part.weight for part in parts]
    total = asked if isinstance(spec.samples, int) else _fitting(weights, asked, pools)
    counts = shares(weights, total)
    _check_counts(pools, counts, total, length=length)
    generator = torch.Generator().manual_seed(spec.seed)
    drawn = [_draw(pool, count, generator, (vocab_size, length)) for pool, count in zip(pools, counts, strict=True)]
    drawn = [with_prefix(windows, prefix, length) for windows in drawn]
    ids = torch.cat(drawn)
    origins = torch.arange(len(drawn)).repeat_interleave(torch.tensor(counts))
    if len(drawn) > 1:
        order = torch.randperm(total, generator=generator)
        ids, origins = ids[order], origins[order]
    sources = tuple(_source(pool, taken) for pool, taken in zip(pools, drawn, strict=True))
    has_text = any(pool.windows is not None for pool in pools)
    end = tokenizer.eos_token_id if tokenizer is not None and has_text else None
    return TokenSet(ids, hash_tokens(ids), asked, sources, tuple(origins.tolist()), prefix, end)


def window_prefix(
    bos: Bos, tokenizer: PreTrainedTokenizerBase | None, *, length: int, vocab_size: int | None
) -> tuple[int, ...]:
    """Ids that every window of `length` tokens begins with: what the tokenizer puts before a text, or none with `never`.

    Raises InputError if they leave no room for text, or one is not below `vocab_size`.
    """
    prefix = special_prefix(tokenizer) if bos == "auto" and tokenizer is not None else ()
    if length <= len(prefix):
        raise InputError(
            f"`sequence_length` {length} leaves no room for text after the ids {list(prefix)} that the tokenizer puts before it; "
            "raise it, or write `bos: never`"
        )
    if vocab_size is not None:
        check_vocabulary(torch.tensor(prefix), vocab_size, "the start of a text")
    return prefix


def with_prefix(windows: Tensor, prefix: tuple[int, ...], length: int) -> Tensor:
    """Windows `(N, length)` that begin with `prefix` and go on with the last ids of each row of `windows`."""
    if not prefix:
        return windows
    head = torch.tensor(prefix, dtype=torch.int64).expand(len(windows), -1)
    return torch.cat([head, windows[:, len(prefix) - length :]], dim=1)


def pack(stream: Tensor, length: int) -> Tensor:
    """Cut a stream `(T,)` into its ⌊T/L⌋ contiguous windows `(N, L)`; fewer than L tokens at the end are dropped."""
    count = len(stream) // length
    return stream[: count * length].view(count, length)


def shares(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Split `total` into whole numbers in proportion to the weights, by largest remainder; the earlier wins a tie."""
    whole = sum(map(Fraction, weights))
    quotas = [Fraction(weight) * total / whole for weight in weights]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def hash_tokens(ids: Tensor) -> str:
    """sha256 in hex of N, L and the ids `(N, L)` row by row, each as a little-endian 64-bit integer."""
    digest = hashlib.sha256(np.asarray(ids.shape, dtype="<i8").tobytes())
    digest.update(ids.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def check_vocabulary(ids: Tensor, vocab_size: int, dataset: str) -> None:
    """Raise InputError if an id of `ids` (any shape) is not below `vocab_size`."""
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= vocab_size:
        raise InputError(
            f"{dataset}: the tokenizer gives the id {largest}, but the model embeds {vocab_size} tokens; "
            "the tokenizer does not belong to this model: put the right one into the model's folder"
        )


def _parts(spec: CalibrationSpec) -> tuple[_Part, ...]:
    if isinstance(spec.dataset, str):
        return (_Part(spec.dataset, 1.0, spec.split, spec.text_column, spec.messages_column),)
    return tuple(
        _Part(
            part.dataset,
            part.weight,
            part.split or spec.split,
            part.text_column or spec.text_column,
            part.messages_column or (None if part.text_column else spec.messages_column),
        )
        for part in spec.dataset
    )


def _open(
    part: _Part,
    tokenizer: PreTrainedTokenizerBase | None,
    prefix: tuple[int, ...],
    *,
    length: int,
    vocab_size: int,
) -> _Pool:
    if part.dataset == RANDOM_TOKENS:
        return _Pool(part.dataset, None)
    found = load_documents(
        part.dataset,
        split=part.split,
        text_column=part.text_column,
        messages_column=part.messages_column,
        tokenizer=tokenizer,
    )
    stream = encode(found.documents, tokenizer, end=True, prefix=prefix)
    check_vocabulary(stream, vocab_size, part.dataset)
    windows = pack(stream, length - len(prefix))
    if not len(windows):
        raise InputError(
            f"{part.dataset} has only {len(stream)} tokens, less than one window; "
            f"name more text, or a `sequence_length` smaller than {length}"
        )
    return _Pool(part.dataset, windows, len(found.documents), found.empty, len(stream))


def _fitting(weights: Sequence[float], at_most: int, pools: Sequence[_Pool]) -> int:
    """Find the largest total up to `at_most` whose shares all exist, so that the mix keeps its proportions."""
    whole = sum(map(Fraction, weights))
    limits = [
        math.ceil((len(pool.windows) + 1) * whole / Fraction(weight))  # share ≥ ⌊total·weight/whole⌋
        for weight, pool in zip(weights, pools, strict=True)
        if pool.windows is not None
    ]
    for total in range(min([at_most, *limits]), 0, -1):
        counts = shares(weights, total)
        if all(p.windows is None or len(p.windows) >= c for p, c in zip(pools, counts, strict=True)):
            return total
    return 1


def _check_counts(pools: Sequence[_Pool], counts: Sequence[int], total: int, *, length: int) -> None:
    for pool, count in zip(pools, counts, strict=True):
        if count == 0:
            raise InputError(
                f"{pool.dataset} gets none of the {total} samples by its weight; "
                "raise `samples` or its `weight`, or take it out of the list"
            )
        if pool.windows is not None and len(pool.windows) < count:
            raise InputError(
                f"{pool.dataset} has {len(pool.windows)} windows of {length} tokens ({pool.tokens} tokens), "
                f"but {count} are asked for; name more text, a smaller `sequence_length` or fewer `samples`, "
                f"or write `samples: {{at_most: {total}}}`"
            )


def _draw(pool: _Pool, count: int, generator: torch.Generator, size: tuple[int, int]) -> Tensor:
    """Draw `count` windows without replacement, in the order of the draw; `size` is (vocabulary, L)."""
    vocab_size, length = size
    if pool.windows is None:
        return torch.randint(vocab_size, (count, length), generator=generator)
    return pool.windows[torch.randperm(len(pool.windows), generator=generator)[:count]]


def _source(pool: _Pool, taken: Tensor) -> Source:
    if pool.windows is None:
        return Source(pool.dataset, 0, 0, taken.numel(), len(taken), len(taken))
    return Source(pool.dataset, pool.documents, pool.empty, pool.tokens, len(pool.windows), len(taken))
