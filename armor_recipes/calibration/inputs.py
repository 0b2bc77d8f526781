"""What a model is called with: named tensors, chosen by a seed and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor

from armor_recipes.errors import InputError

if TYPE_CHECKING:
    from armor_recipes.calibration.random_inputs import RandomInput

#: Named arguments of a model's forward pass; the first dimension of each is the sample's.
Batch: TypeAlias = Mapping[str, Tensor]

#: Names of a batch with the shape of one sample and the dtype of each.
Form: TypeAlias = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]

#: The name of token ids among them, `(N, L)` int64.
TOKENS = "input_ids"
#: Images as patches, `(N, P, D)` with P of them in each sample.
PIXELS = "pixel_values"
#: The grid `(N, 3)` of frames, rows and columns that patches lie in, as a model and as a vision part by itself call it.
GRIDS = ("image_grid_thw", "grid_thw")


@dataclass(frozen=True, slots=True)
class Source:
    """What an input set took of one dataset.

    Of text, `documents` and `empty` count rows with and without it, `short` documents that are too short to be truncated, `tokens`
    all tokens that windows are cut from (not those that every window begins or ends with), `available` the windows they make,
    `taken` those in the set. Of all else, `documents` are the samples or rows that there are, `available` those that can be taken,
    `tokens` the token ids in those that were, `cut` how many of those were cut to the length asked for. For random numbers,
    `documents` is 0 and the set takes all. Of a `stream`, rows are those that were read, tokens and short documents those up to the
    last window, and what would be available is not known.
    """

    dataset: str
    documents: int
    empty: int
    tokens: int
    available: int | None
    taken: int
    stream: bool = False
    short: int = 0
    cut: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class InputSet:
    """N samples on the CPU, as named tensors `(N, …)`; windows of text are `input_ids` `(N, L)`, int64.

    Where samples are of several shapes (images of several sizes), those of equal shapes follow one another: `tensors` are the
    first of these groups, and `others` the rest. `sha256` is the hash of shapes and values. `asked` is the number of samples asked
    for; N is smaller only where the recipe says `at_most`. `origins` has for each sample the place of its source in `sources`.
    `prefix` is what every window of text begins with, `suffix` what it ends with, `end_of_text` the id put after each document, if
    any.
    """

    tensors: Batch
    sha256: str
    asked: int
    sources: tuple[Source, ...]
    origins: tuple[int, ...]
    prefix: tuple[int, ...] = ()
    end_of_text: int | None = None
    suffix: tuple[int, ...] = ()
    others: tuple[Batch, ...] = ()

    def __len__(self) -> int:
        return sum(len(leading(group)) for group in self.groups)

    @property
    def groups(self) -> tuple[Batch, ...]:
        """The samples in order, those of equal shapes together."""
        return (self.tensors, *self.others)

    def sample(self, place: int) -> Batch:
        """One sample."""
        for group in self.groups:
            if place < len(leading(group)):
                return some_of(group, slice(place, place + 1))
            place -= len(leading(group))
        raise IndexError(place)

    @property
    def is_windows(self) -> bool:
        """Whether samples are windows of token ids and nothing else."""
        return self.tensors.keys() == {TOKENS}

    @property
    def ids(self) -> Tensor:
        """Token ids `(N, L)`. Raises KeyError where the model reads none."""
        return self.tensors[TOKENS]

    @property
    def dataset(self) -> str:
        """Names of the datasets, joined by ` + `."""
        return " + ".join(source.dataset for source in self.sources)

    def batches(self, size: int) -> list[Batch]:
        """The samples in order, at most `size` at a time, of one shape each."""
        return batched(self.groups, size)


@dataclass(frozen=True, slots=True)
class ModelInputs:
    """What a model can be called with.

    Attributes:
        name: the model's class, for messages.
        vocab_size: rows of the token embedding; None for a model that embeds no tokens.
        arguments: names that the forward pass takes, in its order; empty where they are not known, and nothing is checked.
        encoder_decoder: whether an encoder goes before the decoder.
        decoder_start: the id that the decoder's tokens begin with, None where there is none.
        padding: the id that fills sequences up, None where there is none.
        closes: whether windows of text end with what the tokenizer puts after a text: of encoders, which never write on.
        random: the arguments to draw for samples of so many tokens; raises InputError where that is not known.
    """

    name: str = "the model"
    vocab_size: int | None = None
    arguments: tuple[str, ...] = ()
    encoder_decoder: bool = False
    decoder_start: int | None = None
    padding: int | None = None
    closes: bool = False
    random: Callable[[int], tuple[RandomInput, ...]] | None = None

    @property
    def vocabulary(self) -> int:
        """Rows of the token embedding. Raises InputError where there is none."""
        if self.vocab_size is None:
            raise InputError(
                f"{self.name} embeds no tokens (its config.json names no vocab_size), so that text cannot be used; give images by "
                "`image_column`, a .safetensors file of its inputs, or builtin:random-inputs"
            )
        return self.vocab_size


def hash_inputs(tensors: Batch) -> str:
    """sha256 in hex of named tensors; of windows of tokens alone it is `hash_tokens`.

    Of each, sorted by name: name, dtype and shape as a line of text, then its values, row by row and little-endian.
    """
    if tensors.keys() == {TOKENS}:
        return hash_tokens(tensors[TOKENS])
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def hash_groups(groups: Sequence[Batch]) -> str:
    """`hash_inputs` of samples of one shape; of several groups the sha256 of theirs, one after the other."""
    hashes = list(map(hash_inputs, groups))
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(b"".join(map(bytes.fromhex, hashes))).hexdigest()


def hash_tokens(ids: Tensor) -> str:
    """sha256 in hex of N, L and the ids `(N, L)` row by row, each as a little-endian 64-bit integer."""
    digest = hashlib.sha256(np.asarray(ids.shape, dtype="<i8").tobytes())
    digest.update(ids.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def leading(batch: Batch) -> Tensor:
    """What tells the size of a batch: its token ids `(B, L)` if there are any, else its first tensor."""
    return batch[TOKENS] if TOKENS in batch else next(iter(batch.values()))


def form_of(batch: Batch) -> Form:
    """Names, shapes of a sample and dtypes: samples that have these alike can be one batch."""
    return tuple((name, tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in batch.items())


def places_by_form(forms: Iterable[Form]) -> list[list[int]]:
    """The places of forms that are alike, in the order in which they first come."""
    found: dict[Form, list[int]] = {}
    for place, form in enumerate(forms):
        found.setdefault(form, []).append(place)
    return list(found.values())


def stacked(batches: Sequence[Batch]) -> Batch:
    """Batches of equal forms as one."""
    return {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}


def batched(groups: Iterable[Batch], size: int) -> list[Batch]:
    """The samples of groups in order, at most `size` at a time, none of two groups together."""
    return [
        some_of(group, slice(start, start + size)) for group in groups for start in range(0, len(leading(group)), size)
    ]


def arguments(batch: Batch) -> Batch:
    """A batch as a forward pass takes it: models that read grids want the patches of all samples in one list `(N·P, D)`."""
    pixels = batch.get(PIXELS)
    if pixels is None or pixels.ndim < 3 or batch.keys().isdisjoint(GRIDS):
        return batch
    return {**batch, PIXELS: pixels.flatten(0, 1)}


def some_of(batch: Batch, samples: slice) -> Batch:
    """Some samples of a batch."""
    return {name: tensor[samples] for name, tensor in batch.items()}
