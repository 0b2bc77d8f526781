"""Windows of tokens: what they begin with, how they are cut, and which ids they may hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armor_recipes.calibration.encoding import special_ends
from armor_recipes.errors import InputError
from armor_recipes.recipe.schema import Bos

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def window_prefix(
    bos: Bos, tokenizer: PreTrainedTokenizerBase | None, *, length: int, vocab_size: int | None
) -> tuple[int, ...]:
    """Ids that every window of `length` tokens begins with: what the tokenizer puts before a text, or none with `never`.

    Raises InputError if they leave no room for text, or one is not below `vocab_size`.
    """
    return window_ends(bos, tokenizer, length=length, vocab_size=vocab_size, closes=False)[0]


def window_ends(
    bos: Bos, tokenizer: PreTrainedTokenizerBase | None, *, length: int, vocab_size: int | None, closes: bool
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids that every window begins with, and with `closes` those that it ends with: what the tokenizer puts around a text.

    Raises InputError as `window_prefix` does.
    """
    prefix, suffix = special_ends(tokenizer) if bos == "auto" and tokenizer is not None else ((), ())
    suffix = suffix if closes else ()
    if length <= len(prefix) + len(suffix):
        around = f"{list(prefix)} and {list(suffix)}" if suffix else f"{list(prefix)}"
        place = "around" if suffix else "before"
        raise InputError(
            f"`sequence_length` {length} leaves no room for text after the ids {around} that the tokenizer puts {place} it; "
            "raise it, or write `bos: never`"
        )
    if vocab_size is not None:
        check_vocabulary(torch.tensor(prefix + suffix), vocab_size, "the start of a text")
    return prefix, suffix


def with_prefix(windows: Tensor, prefix: tuple[int, ...], length: int, suffix: tuple[int, ...] = ()) -> Tensor:
    """Windows `(N, length)` that begin with `prefix`, go on with the last ids of each row of `windows`, and end with `suffix`."""
    if not prefix and not suffix:
        return windows
    head, tail = (torch.tensor(ids, dtype=torch.int64).expand(len(windows), -1) for ids in (prefix, suffix))
    return torch.cat([head, windows[:, len(prefix) + len(suffix) - length :], tail], dim=1)


def pack(stream: Tensor, length: int) -> Tensor:
    """Cut a stream `(T,)` into its ⌊T/L⌋ contiguous windows `(N, L)`; fewer than L tokens at the end are dropped."""
    count = len(stream) // length
    return stream[: count * length].view(count, length)


def check_vocabulary(ids: Tensor, vocab_size: int, dataset: str) -> None:
    """Raise InputError if an id of `ids` (any shape) is not below `vocab_size`."""
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= vocab_size:
        raise InputError(
            f"{dataset}: the tokenizer gives the id {largest}, but the model embeds {vocab_size} tokens; "
            "the tokenizer does not belong to this model: put the right one into the model's folder"
        )
