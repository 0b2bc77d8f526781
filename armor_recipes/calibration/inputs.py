"""What a model is called with: named tensors, chosen by a seed and hashed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

#: Named arguments of a model's forward pass; the first dimension of each is the sample's.
Batch: TypeAlias = Mapping[str, Tensor]

#: The name of token ids among them, `(N, L)` int64.
TOKENS = "input_ids"


@dataclass(frozen=True, slots=True)
class Source:
    """What an input set took of one dataset.

    `documents` and `empty` count rows with and without text, `short` documents that are too short to be truncated, `tokens` all
    tokens that windows are cut from (not those that every window begins with), `available` the windows they make, `taken` those
    in the set. For random tokens, `documents` is 0 and the set takes all. Of a `stream`, rows are those that were read, tokens
    and short documents those up to the last window, and what would be available is not known.
    """

    dataset: str
    documents: int
    empty: int
    tokens: int
    available: int | None
    taken: int
    stream: bool = False
    short: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class InputSet:
    """N samples on the CPU, as named tensors `(N, …)`; windows of text are `input_ids` `(N, L)`, int64.

    `sha256` is the hash of shapes and values. `asked` is the number of samples asked for; N is smaller only where the recipe says
    `at_most`. `origins` has for each sample the place of its source in `sources`. `prefix` is what every window of text begins
    with, `end_of_text` the id put after each document, if any.
    """

    tensors: Batch
    sha256: str
    asked: int
    sources: tuple[Source, ...]
    origins: tuple[int, ...]
    prefix: tuple[int, ...] = ()
    end_of_text: int | None = None

    def __len__(self) -> int:
        return len(leading(self.tensors))

    @property
    def ids(self) -> Tensor:
        """Token ids `(N, L)`. Raises KeyError where the model reads none."""
        return self.tensors[TOKENS]

    @property
    def dataset(self) -> str:
        """Names of the datasets, joined by ` + `."""
        return " + ".join(source.dataset for source in self.sources)

    def batches(self, size: int) -> list[Batch]:
        """The samples in order, `size` at a time."""
        return [some_of(self.tensors, slice(start, start + size)) for start in range(0, len(self), size)]


def leading(batch: Batch) -> Tensor:
    """What tells the size of a batch: its token ids `(B, L)` if there are any, else its first tensor."""
    return batch[TOKENS] if TOKENS in batch else next(iter(batch.values()))


def some_of(batch: Batch, samples: slice) -> Batch:
    """Some samples of a batch."""
    return {name: tensor[samples] for name, tensor in batch.items()}
