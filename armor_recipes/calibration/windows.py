"""Windows of tokens: what they begin with, how they are cut, and which ids they may hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from armor_recipes.calibration.encoding import special_prefix
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


def check_vocabulary(ids: Tensor, vocab_size: int, dataset: str) -> None:
    """Raise InputError if an id of `ids` (any shape) is not below `vocab_size`."""
    largest = int(ids.max()) if ids.numel() else 0
    if largest >= vocab_size:
        raise InputError(
            f"{dataset}: the tokenizer gives the id {largest}, but the model embeds {vocab_size} tokens; "
            "the tokenizer does not belong to this model: put the right one into the model's folder"
        )
