"""Samples that are measured one by one: texts as they are tokenised, each with its own length, or rows of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Any, Protocol

import torch

from armor_recipes.calibration.files import Cell, Column, Columns, shown
from armor_recipes.calibration.inputs import TOKENS, Batch, hash_inputs, leading, some_of
from armor_recipes.calibration.text import cells, encodable, is_empty
from armor_recipes.calibration.windows import check_vocabulary
from armor_recipes.errors import InputError
from armor_recipes.evaluation.contract import Reading
from armor_recipes.recipe.problems import nearest

#: Texts handed to the tokenizer at once.
_AT_ONCE = 512


class Samples(Protocol):
    """N samples, in batches."""

    def __len__(self) -> int: ...

    def batches(self, size: int) -> Iterator[tuple[list[int], Batch]]:
        """At most `size` samples at a time: their places, and what the model is called with."""

    def hash(self) -> str:
        """sha256 in hex of all samples."""


@dataclass(frozen=True, slots=True, eq=False)
class Texts:
    """Token ids of texts, and what else the tokenizer gives with them; `cut` of them were longer and lost their end.

    Texts of equal length are batched, so that nothing is ever padded: a figure does not depend on which texts stand together.
    """

    rows: tuple[dict[str, list[int]], ...]
    cut: int

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, size: int) -> Iterator[tuple[list[int], Batch]]:
        """Texts of one length, the shortest first, at most `size` at a time."""

        def length(place: int) -> int:
            return len(self.rows[place][TOKENS])

        for _, group in groupby(sorted(range(len(self.rows)), key=length), key=length):
            places = list(group)
            for start in range(0, len(places), size):
                some = places[start : start + size]
                names = self.rows[some[0]]
                yield some, {name: torch.tensor([self.rows[place][name] for place in some]) for name in names}

    def hash(self) -> str:
        """Of the number of texts, and of the length and the ids of each, as little-endian 64-bit integers."""
        digest = hashlib.sha256(len(self.rows).to_bytes(8, "little"))
        for row in self.rows:
            for number in (len(row[TOKENS]), *row[TOKENS]):
                digest.update(number.to_bytes(8, "little"))
        return digest.hexdigest()


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of named tensors `(N, …)`."""

    tensors: Batch

    def __len__(self) -> int:
        return len(leading(self.tensors))

    def batches(self, size: int) -> Iterator[tuple[list[int], Batch]]:
        """Rows in order."""
        for start in range(0, len(self), size):
            some = slice(start, min(start + size, len(self)))
            yield list(range(len(self))[some]), some_of(self.tensors, some)

    def hash(self) -> str:
        """As of calibration inputs."""
        return hash_inputs(self.tensors)


def tokenised(texts: Sequence[str], reading: Reading, *, length: int, dataset: str) -> Texts:
    """Texts as the tokenizer writes them with its special tokens, cut to `length` tokens. Raises InputError."""
    if reading.tokenizer is None:
        raise InputError(f"{dataset}: the model has no tokenizer, so that text cannot be used; add one")
    rows: list[dict[str, list[int]]] = []
    cut = 0
    for start in range(0, len(texts), _AT_ONCE):
        part = list(texts[start : start + _AT_ONCE])
        found = _tokens(reading.tokenizer(part, verbose=False))
        longer = [place for place, row in enumerate(found) if len(row[TOKENS]) > length]
        if longer:
            texts_cut = [part[place] for place in longer]
            shorter = _tokens(reading.tokenizer(texts_cut, truncation=True, max_length=length, verbose=False))
            for place, row in zip(longer, shorter, strict=True):
                found[place] = row
        cut += len(longer)
        rows += found
    for place, row in enumerate(rows):
        if not row[TOKENS]:
            raise InputError(f"{dataset}: the tokenizer makes no token of text {place} (from 0); remove it")
        if reading.model.vocab_size is not None:
            check_vocabulary(torch.tensor(row[TOKENS]), reading.model.vocab_size, dataset)
    return Texts(tuple(rows), cut)


def _tokens(encoding: Any) -> list[dict[str, list[int]]]:
    """What a tokenizer gives, text by text."""
    return [{name: values[place] for name, values in encoding.items()} for place in range(len(encoding[TOKENS]))]


def hash_with(samples: str, *numbers: int) -> str:
    """sha256 in hex of the samples' own, and of what is right of them."""
    return hashlib.sha256(" ".join((samples, *map(str, numbers))).encode()).hexdigest()


def table(dataset: str, split: str, columns: Sequence[tuple[str, str]], at_most: int | None) -> list[tuple[Cell, ...]]:
    """The first rows of a dataset (None: all), a cell for each of the columns, which are told by name and by the recipe's key.

    They are read together, so that text without columns is none. Raises InputError.
    """
    wanted = Columns(tuple(Column(name, key) for name, key in columns))
    found = []
    for row in first_rows(dataset, cells(dataset, split, wanted), at_most):
        assert isinstance(row.value, tuple)
        found.append(tuple(Cell(value, row.where) for value in row.value))
    return found


def first_rows(dataset: str, rows: Iterable[Cell], at_most: int | None) -> list[Cell]:
    """The first rows (None: all) of a dataset. Raises InputError where there are fewer."""
    found = list(islice(rows, at_most))
    if not found:
        raise InputError(f"{dataset} has no rows; name another dataset")
    if at_most is not None and len(found) < at_most:
        raise InputError(f"{dataset} has {len(found)} rows, but {at_most} are asked for; lower `samples`")
    return found


def text_of(cell: Cell, key: str) -> str:
    """The cell's text. Raises InputError for anything else, and for an empty one."""
    if not isinstance(cell.value, str):
        raise InputError(f"{cell.where}: `{key}` holds {cell.value!r:.80}, not text; correct or remove the row")
    if is_empty(cell.value):
        raise InputError(f"{cell.where}: `{key}` holds an empty text; correct or remove the row")
    return encodable(cell.value, cell.where)


def label_of(cell: Cell, reading: Reading, said: str = "`label_column` holds") -> int:
    """A label as a number of a class: itself, or by its name in the model's config. Raises InputError, in which it is `said`."""
    value, known = cell.value, reading.labels
    if isinstance(value, str):
        if value not in known:
            raise InputError(
                f"{cell.where}: {said} {shown(value)}, no class of the model; {nearest(value, known, noun='label')}"
            )
        return known[value]
    if isinstance(value, bool) or not isinstance(value, int):
        raise InputError(f"{cell.where}: {said} {value!r:.80}, neither a class's number nor its name")
    if not 0 <= value < len(known):
        raise InputError(f"{cell.where}: {said} {value}; the model's classes are 0 to {len(known) - 1}")
    return value
