"""Windows of tokens, chosen by a seed and hashed. `docs/calibration.md` states the rule."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from armor_recipes.calibration.inputs import TOKENS, InputSet, Source
from armor_recipes.calibration.pools import Part, Pool, Rule, open_pool
from armor_recipes.calibration.windows import window_prefix, with_prefix
from armor_recipes.errors import InputError
from armor_recipes.recipe.schema import CalibrationSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def build_tokens(spec: CalibrationSpec, *, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> InputSet:
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
    rule = Rule(length, prefix, spec.documents, spec.seed, vocab_size)
    asked = spec.samples if isinstance(spec.samples, int) else spec.samples.at_most
    parts = _parts(spec)
    weights = [part.weight for part in parts]
    needed = most_of(weights, asked)
    pools = [open_pool(part, tokenizer, rule, most) for part, most in zip(parts, needed, strict=True)]
    total = asked if isinstance(spec.samples, int) else _fitting(weights, asked, pools)
    counts = shares(weights, total)
    for pool, count in zip(pools, counts, strict=True):
        _check_count(pool, count, total, rule)
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
    return InputSet({TOKENS: ids}, hash_tokens(ids), asked, sources, tuple(origins.tolist()), prefix, end)


def shares(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """Split `total` into whole numbers in proportion to the weights, by largest remainder; the earlier wins a tie."""
    whole = sum(map(Fraction, weights))
    quotas = [Fraction(weight) * total / whole for weight in weights]
    counts = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for i in by_remainder[: total - sum(counts)]:
        counts[i] += 1
    return tuple(counts)


def most_of(weights: Sequence[float], total: int) -> tuple[int, ...]:
    """What the shares of no smaller total exceed: each quota of `total`, rounded up."""
    whole = sum(map(Fraction, weights))
    return tuple(math.ceil(Fraction(weight) * total / whole) for weight in weights)


def hash_tokens(ids: Tensor) -> str:
    """sha256 in hex of N, L and the ids `(N, L)` row by row, each as a little-endian 64-bit integer."""
    digest = hashlib.sha256(np.asarray(ids.shape, dtype="<i8").tobytes())
    digest.update(ids.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _parts(spec: CalibrationSpec) -> tuple[Part, ...]:
    if isinstance(spec.dataset, str):
        return (Part(spec.dataset, 1.0, spec.split, spec.text_column, spec.messages_column, spec.stream),)
    return tuple(
        Part(
            part.dataset,
            part.weight,
            part.split or spec.split,
            part.text_column or spec.text_column,
            part.messages_column or (None if part.text_column else spec.messages_column),
            spec.stream if part.stream is None else part.stream,
        )
        for part in spec.dataset
    )


def _fitting(weights: Sequence[float], at_most: int, pools: Sequence[Pool]) -> int:
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


def _check_count(pool: Pool, count: int, total: int, rule: Rule) -> None:
    if count == 0:
        raise InputError(
            f"{pool.dataset} gets none of the {total} samples by its weight; "
            "raise `samples` or its `weight`, or take it out of the list"
        )
    if pool.windows is None or len(pool.windows) >= count:
        return
    found = f"windows of {rule.length} tokens ({pool.tokens} tokens)"
    if rule.documents == "truncated":
        found = f"documents of {rule.length} tokens or more ({pool.short} are shorter)"
    raise InputError(
        f"{pool.dataset} has {len(pool.windows)} {found}, but {count} are asked for; name more text, a smaller `sequence_length` "
        f"or fewer `samples`, or write `samples: {{at_most: {total}}}`"
    )


def _draw(pool: Pool, count: int, generator: torch.Generator, size: tuple[int, int]) -> Tensor:
    """Draw `count` windows without replacement, in the order of the draw, which a stream has already; `size` is (vocabulary, L)."""
    vocab_size, length = size
    if pool.windows is None:
        return torch.randint(vocab_size, (count, length), generator=generator)
    if pool.stream:
        return pool.windows[:count]
    return pool.windows[torch.randperm(len(pool.windows), generator=generator)[:count]]


def _source(pool: Pool, taken: Tensor) -> Source:
    if pool.windows is None:
        return Source(pool.dataset, 0, 0, taken.numel(), len(taken), len(taken))
    available = None if pool.stream else len(pool.windows)
    return Source(pool.dataset, pool.documents, pool.empty, pool.tokens, available, len(taken), pool.stream, pool.short)
