"""Documents of a dataset in an order drawn by a seed, of which no more is read than is asked for.

`docs/calibration.md` states the rule.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import torch

from armor_recipes.calibration.files import Cell, Column, Columns
from armor_recipes.calibration.hub import hub_sections
from armor_recipes.calibration.sections import Sections, path_sections
from armor_recipes.calibration.text import BUILTIN, builtin_rows, is_empty, local_path, reader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Sections that are open at a time.
_OPEN = 8
#: Rows that are read before documents are drawn from among them, and characters after which fewer will do.
_ROWS, _CHARACTERS = 4096, 1 << 24


@dataclass(slots=True, eq=False)
class Stream:
    """Documents of a dataset's sections; `documents` and `empty` count the rows read so far, with text and without.

    `text` gives a row's text. A text of more than `longest` characters is cut into documents no longer than that; or, where
    only `beginnings` are wanted, its first characters are its document.
    """

    sections: Sections
    text: Callable[[Cell], str]
    longest: int
    beginnings: bool
    documents: int = 0
    empty: int = 0

    def batches(self, seed: int) -> Iterator[list[str]]:
        """All documents, in lists that are read one by one and are in the order that the seed gives them.

        Raises InputError for what is wrong with a row that is read. Ends after the first rows if all of them are empty.
        """
        generator = torch.Generator().manual_seed(seed)
        rows = _in_turn(self.sections, generator)
        while texts := self._read(rows):
            parts = [part for text in texts for part in self._parts(text)]
            yield [parts[i] for i in torch.randperm(len(parts), generator=generator).tolist()]

    def _read(self, rows: Iterator[Cell]) -> list[str]:
        texts, size = [], 0
        for count, cell in enumerate(rows, start=1):
            text = self.text(cell)
            size += len(text)
            if is_empty(text):
                self.empty += 1
            else:
                self.documents += 1
                texts.append(text)
            if (count >= _ROWS or size >= _CHARACTERS) and (texts or not self.documents):
                break
        return texts

    def _parts(self, text: str) -> Iterator[str]:
        """Cut a text after the last space that is near enough, or else anywhere."""
        start = 0
        while start < len(text):
            stop = start + self.longest
            if stop < len(text) and not self.beginnings:
                stop = text.rfind(" ", start, stop) + 1 or stop
            yield text[start:stop]
            start = len(text) if self.beginnings else stop


def open_stream(
    dataset: str,
    *,
    split: str,
    text_column: str,
    messages_column: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    longest: int,
    beginnings: bool,
) -> Stream:
    """Find a dataset's sections and read nothing else; arguments are those of `load_documents` and of `Stream`.

    Raises InputError if there is no such dataset, or it cannot be read in sections.
    """
    column, text = reader(text_column, messages_column, tokenizer)
    size = longest // 2  # a piece of plain text may be twice its stretch, and is one document
    return Stream(_sections(dataset, split, column, size), text, longest, beginnings)


def stream_rows(
    dataset: str, split: str, column: Column | Columns, *, size: int, seed: int, weight: Callable[[Cell], int]
) -> Iterator[Cell]:
    """Rows of a dataset in the order that the seed gives them, read as they are asked for, in stretches of `size` bytes.

    `weight` are the bytes that a row takes; rows are shuffled within as many as are held at a time. Raises as `open_stream`.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = _in_turn(_sections(dataset, split, column, size), generator)
    while held := _some(rows, weight):
        for i in torch.randperm(len(held), generator=generator).tolist():
            yield held[i]


def _some(rows: Iterator[Cell], weight: Callable[[Cell], int]) -> list[Cell]:
    """The next rows, until they are enough to draw from."""
    held, size = [], 0
    for cell in rows:
        held.append(cell)
        size += weight(cell)
        if len(held) >= _ROWS or size >= _CHARACTERS:
            break
    return held


def _sections(dataset: str, split: str, column: Column | Columns, size: int) -> Sections:
    if dataset.startswith(BUILTIN):
        texts = builtin_rows(dataset, column)
        return Sections(1, lambda _: texts)
    path = local_path(dataset)
    return hub_sections(dataset, split, column) if path is None else path_sections(path, column, size)


def _in_turn(sections: Sections, generator: torch.Generator) -> Iterator[Cell]:
    """Rows of sections in random order, a row of each open one in turn; one that ends gives its place to the next."""
    waiting = map(sections.rows, _shuffled(sections.count, generator))
    turns = deque(islice(waiting, _OPEN))
    while turns:
        rows = turns.popleft()
        if (cell := next(rows, None)) is not None:
            yield cell
            turns.append(rows)
        else:
            turns.extendleft(islice(waiting, 1))


def _shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    """The numbers below `count` in random order: a Fisher-Yates shuffle that holds only what it has moved so far."""
    moved: dict[int, int] = {}
    for place in range(count):
        chosen = int(torch.randint(place, count, (1,), generator=generator))
        yield moved.get(chosen, chosen)
        moved[chosen] = moved.pop(place, place)
