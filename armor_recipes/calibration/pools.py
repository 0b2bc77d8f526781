"""The samples that a dataset gives: windows of text, or the first of them that a stream's documents make; named tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from torch import Generator, Tensor

from armor_recipes.calibration.encoding import Ids, encoded, join
from armor_recipes.calibration.files import Cell, Columns
from armor_recipes.calibration.images import (
    Picture,
    folder_cells,
    image_columns,
    is_image_folder,
    load_images,
    picture_of,
)
from armor_recipes.calibration.inputs import TOKENS, Batch, ModelInputs, leading
from armor_recipes.calibration.pairs import Pair, load_pairs, pair_columns, pair_of
from armor_recipes.calibration.random_inputs import draw
from armor_recipes.calibration.stream import open_stream, stream_rows
from armor_recipes.calibration.tensors import (
    LABELS,
    TensorFiles,
    check_arguments,
    check_values,
    is_tensors,
    load_tensors,
)
from armor_recipes.calibration.text import (
    BUILTIN,
    RANDOM_INPUTS,
    RANDOM_TOKENS,
    cells,
    load_documents,
    local_path,
    no_text,
)
from armor_recipes.calibration.windows import check_vocabulary, pack, with_prefix
from armor_recipes.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = TypeVar("Row")

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
    source_column: str | None = None
    target_column: str | None = None
    image_column: str | None = None
    reads_text_beside: bool = False
    """Whether a text column was named to go with the images."""

    @property
    def has_windows(self) -> bool:
        """Whether its samples are windows of tokens."""
        return self.has_text and self.source_column is None and self.target_column is None

    @property
    def has_text(self) -> bool:
        """Whether its samples are made of text or of random tokens alone."""
        others = self.image_column is not None or self.dataset == RANDOM_INPUTS
        return not others and tensors_path(self.dataset) is None


@dataclass(frozen=True, slots=True)
class Rule:
    """How samples are made: windows of `length` tokens that begin with `prefix` and end with `suffix`; `seed` orders a stream."""

    length: int
    prefix: tuple[int, ...]
    documents: Literal["packed", "truncated"]
    seed: int
    inputs: ModelInputs
    suffix: tuple[int, ...] = ()

    @property
    def room(self) -> int:
        """Tokens of text in a window."""
        return self.length - len(self.prefix) - len(self.suffix)

    @property
    def characters(self) -> int:
        """Characters of a document that make a few windows."""
        return _CHARACTERS * self.length


@dataclass(frozen=True, slots=True, eq=False)
class Tools:
    """What comes with a model to make inputs of rows; `processor(texts)` is that of images, with text or without."""

    tokenizer: PreTrainedTokenizerBase | None = None
    processor: Callable[[bool], Any] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """Samples that were drawn, in batches of equal shapes, and how many of them were cut to the length asked for."""

    batches: tuple[Batch, ...]
    cut: int = 0

    @classmethod
    def of(cls, tensors: Batch, cut: int = 0) -> Drawn:
        """Samples of one shape."""
        return cls((tensors,), cut)

    def __len__(self) -> int:
        return sum(len(leading(batch)) for batch in self.batches)


@dataclass(frozen=True, slots=True, eq=False)
class Pool:
    """Samples of one dataset: `count` of them, None where there is no end. Other counts are as in `Source`.

    `draw` gives so many of them, drawn without replacement by the generator; in the order of the draw, which a stream has already.
    `found` says for messages what there is.
    """

    dataset: str
    count: int | None
    draw: Callable[[int, Generator], Drawn]
    documents: int = 0
    empty: int = 0
    short: int = 0
    tokens: int = 0
    stream: bool = False
    found: str = "samples"
    advice: str = "name more"
    is_text: bool = False
    of_any_shape: bool = False
    """Whether a sample may have another shape than others."""


@dataclass(frozen=True, slots=True, eq=False)
class _Cut:
    windows: Tensor
    tokens: int
    short: int = 0


def tensors_path(dataset: str) -> Path | None:
    """The path of a dataset of safetensors files; None for any other."""
    path = None if dataset.startswith(BUILTIN) else local_path(dataset)
    return path if path is not None and is_tensors(path) else None


def open_pool(part: Part, tools: Tools, rule: Rule, needed: int) -> Pool:
    """Make all samples of a dataset, or of a stream the first `needed` and no more.

    Raises InputError if the dataset cannot be read or has no sample, or does not fit the model.
    """
    if part.dataset == RANDOM_INPUTS:
        return _random_inputs(part.dataset, rule)
    if (path := tensors_path(part.dataset)) is not None:
        return _stored(load_tensors(part.dataset, path), rule, stream=part.stream is True)
    if part.dataset == RANDOM_TOKENS:
        return Pool(part.dataset, None, partial(_random_tokens, rule))
    if part.image_column is not None:
        return _pictures(part, part.image_column, tools, rule, needed)
    if part.source_column is not None and part.target_column is not None:
        return _pairs(part, pair_columns(part.source_column, part.target_column), tools, rule, needed)
    tokenizer = tools.tokenizer
    return _streamed(part, tokenizer, rule, needed) if _is_stream(part) else _whole(part, tokenizer, rule)


def _random_tokens(rule: Rule, samples: int, generator: Generator) -> Drawn:
    ids = torch.randint(rule.inputs.vocabulary, (samples, rule.length), generator=generator)
    return _around(ids, rule)


def _random_inputs(dataset: str, rule: Rule) -> Pool:
    if rule.inputs.random is None:
        raise InputError(
            f"{dataset} needs a model whose inputs are known, here is none; use {RANDOM_TOKENS} or a .safetensors file of inputs"
        )
    inputs = rule.inputs.random(rule.length)
    return Pool(dataset, None, lambda samples, generator: Drawn.of(draw(inputs, samples, generator)))


def _stored(files: TensorFiles, rule: Rule, *, stream: bool) -> Pool:
    """Samples of safetensors files, of which only those that are drawn are read."""
    if stream:
        raise InputError(
            f"{files.dataset} needs no `stream: true`: of safetensors files only the samples that are drawn are read; take it out"
        )
    names = [name for name in files.names if name != LABELS]
    check_arguments(names, rule.inputs, files.dataset)
    if not names:
        raise InputError(
            f"{files.dataset} holds {LABELS} alone; write the arguments of the model's forward pass beside them"
        )

    def taken(samples: int, generator: Generator) -> Drawn:
        numbers = torch.randperm(len(files), generator=generator)[:samples].tolist()
        tensors = {name: tensor for name, tensor in files.rows(numbers).items() if name != LABELS}
        check_values(tensors, rule.inputs, files.dataset)
        return Drawn.of(tensors)

    return Pool(files.dataset, len(files), taken, len(files))


def _pairs(part: Part, columns: Columns, tools: Tools, rule: Rule, needed: int) -> Pool:
    rows = _rows(part, columns, pair_of, rule, needed)

    def made(pairs: list[Pair]) -> Drawn:
        tensors, cut = load_pairs(pairs, rule.inputs, tools.tokenizer, rule.length)
        for name in ("input_ids", "decoder_input_ids"):
            check_vocabulary(tensors[name], rule.inputs.vocabulary, part.dataset)
        return Drawn.of(tensors, cut)

    return _pool_of_rows(part.dataset, rows, made)


def _pictures(part: Part, column: str, tools: Tools, rule: Rule, needed: int) -> Pool:
    path = local_path(part.dataset)
    folder = Path() if path is None else path if path.is_dir() else path.parent
    text = part.text_column if part.reads_text_beside else None
    columns = image_columns(column, text, part.messages_column)
    images = path is not None and is_image_folder(path)
    if images and len(columns.columns) > 1:
        raise InputError(
            f"{part.dataset} is a folder of images, without text; list them with their text in a .jsonl file, and name that"
        )
    found = folder_cells(path) if images and path is not None else None
    rows = _rows(part, columns, partial(picture_of, folder), rule, needed, found)

    def made(pictures: list[Picture]) -> Drawn:
        rows = load_images(pictures, tools.processor, rule.length)
        check_arguments(list(rows[0]), rule.inputs, f"what the processor makes of {part.dataset}")
        for row, picture in zip(rows, pictures, strict=True):
            check_values(row, rule.inputs, picture.where)
        return Drawn(rows)

    return replace(_pool_of_rows(part.dataset, rows, made), of_any_shape=True)


@dataclass(frozen=True, slots=True, eq=False)
class _Rows(Generic[Row]):
    """Rows that can be taken, and how many were passed over since they lack a part."""

    rows: list[Row]
    empty: int
    stream: bool


def _rows(
    part: Part,
    columns: Columns,
    read: Callable[[Cell], Row | None],
    rule: Rule,
    needed: int,
    found: Iterable[Cell] | None = None,
) -> _Rows[Row]:
    """All rows of a dataset, or the first of a stream that are needed. Raises InputError if there is none."""
    stream = found is None and _is_stream(part)
    if stream:
        size = rule.characters // 2
        found = stream_rows(part.dataset, part.split, columns, size=size, seed=rule.seed, weight=_weight)
    rows: list[Row] = []
    empty = 0
    for cell in cells(part.dataset, part.split, columns) if found is None else found:
        row = read(cell)
        if row is None:
            empty += 1
        else:
            rows.append(row)
        if stream and len(rows) == needed:
            break
    if not rows:
        names = " and ".join(f"`{column.key}`" for column in columns.columns)
        raise InputError(
            f"{part.dataset} has no row that can be used: {empty} lack a part; name another dataset or {names}"
        )
    return _Rows(rows, empty, stream)


def _weight(cell: Cell) -> int:
    """Bytes that a row takes, roughly."""
    assert isinstance(cell.value, tuple)
    parts = (value.get("bytes") if isinstance(value, dict) else value for value in cell.value)
    return sum(len(part) for part in parts if isinstance(part, (str, bytes)))


def _pool_of_rows(dataset: str, found: _Rows[Row], made: Callable[[list[Row]], Drawn]) -> Pool:
    count = len(found.rows)

    def taken(samples: int, generator: Generator) -> Drawn:
        order = range(samples) if found.stream else torch.randperm(count, generator=generator)[:samples].tolist()
        return made([found.rows[i] for i in order])

    return Pool(dataset, count, taken, count, found.empty, stream=found.stream, found="rows")


def _around(windows: Tensor, rule: Rule) -> Drawn:
    return Drawn.of({TOKENS: with_prefix(windows, rule.prefix, rule.length, rule.suffix)})


def _windows(windows: Tensor, rule: Rule, samples: int, generator: Generator) -> Drawn:
    """Windows `(samples, L)` of those `(N, room)`, drawn."""
    return _around(windows[torch.randperm(len(windows), generator=generator)[:samples]], rule)


def _first_windows(windows: Tensor, rule: Rule, samples: int, _: Generator) -> Drawn:
    """The first windows of a stream, which are drawn already."""
    return _around(windows[:samples], rule)


def _pool_of(dataset: str, cut: _Cut, rule: Rule, *, documents: int, empty: int, stream: bool) -> Pool:
    """The pool of windows that were cut. Raises InputError if there are none."""
    count = len(cut.windows)
    if not count:
        raise _no_window(dataset, cut, rule)
    found = f"windows of {rule.length} tokens ({cut.tokens} tokens)"
    if rule.documents == "truncated":
        found = f"documents of {rule.length} tokens or more ({cut.short} are shorter)"
    return Pool(
        dataset,
        count,
        partial(_first_windows if stream else _windows, cut.windows, rule),
        documents,
        empty,
        cut.short,
        cut.tokens,
        stream,
        found,
        "name more text, a smaller `sequence_length`",
        is_text=True,
    )


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
    return _pool_of(part.dataset, cut, rule, documents=len(texts), empty=found.empty, stream=False)


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
    return _pool_of(part.dataset, cut, rule, documents=stream.documents, empty=stream.empty, stream=True)


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
    check_vocabulary(stream, rule.inputs.vocabulary, dataset)
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
    check_vocabulary(windows, rule.inputs.vocabulary, dataset)
    return _Cut(windows, windows.numel(), short)


def _no_window(dataset: str, cut: _Cut, rule: Rule) -> InputError:
    if rule.documents == "truncated":
        return InputError(
            f"{dataset} has no document of {rule.length} tokens or more ({cut.short} are shorter); name longer ones, a "
            "smaller `sequence_length`, or `documents: packed`"
        )
    return InputError(
        f"{dataset} has only {cut.tokens} tokens, less than one window; "
        f"name more text, or a `sequence_length` smaller than {rule.length}"
    )
