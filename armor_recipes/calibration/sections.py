"""Datasets in sections that can be opened one by one, so that a few rows from all over them can be read without the rest."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from armor_recipes.calibration.files import (
    Cell,
    Column,
    Columns,
    Footer,
    decode,
    files_of,
    open_parquet,
    read_footer,
    readable,
    row_of,
    unknown_kind,
)
from armor_recipes.errors import InputError

#: Bytes of a line of JSON: more of one, and the file is most likely no JSON lines.
_LINE = 1 << 26
#: Rows of a parquet file that become Python values at once.
_ROWS = 64
#: Footers of parquet files that are kept to open them again.
_FOOTERS = 8


@dataclass(frozen=True, slots=True, eq=False)
class Sections:
    """`rows(i)` reads section i of `count`: nothing of it before the first row is asked for. Each row is in one section."""

    count: int
    rows: Callable[[int], Iterator[Cell]]


def joined(parts: Sequence[Sections]) -> Sections:
    """The sections of all parts, one part after the other."""
    ends = list(accumulate(part.count for part in parts))

    def rows(number: int) -> Iterator[Cell]:
        place = bisect_right(ends, number)
        return parts[place].rows(number - ends[place] + parts[place].count)

    return Sections(ends[-1], rows)


def path_sections(path: Path, column: Column | Columns, size: int) -> Sections:
    """Sections of a file or of all files of a folder: stretches of `size` bytes, row groups of parquet.

    Raises InputError as `read_path` does, but for what is wrong inside, which is told when a section is read.
    """
    footer = lru_cache(maxsize=_FOOTERS)(read_footer)
    return joined([_file_sections(file, column, size, footer) for file in files_of(path)])


def _file_sections(path: Path, column: Column | Columns, size: int, footer: Footer) -> Sections:
    match path.suffix.lower():
        case ".txt" | ".md":
            column.check_plain(str(path))
            return _stretches(path, size, _text)
        case ".jsonl":
            return _stretches(path, size, partial(_json_lines, column))
        case ".parquet":
            with readable(path), open_parquet(path, column, footer) as file:
                return Sections(file.num_row_groups, partial(_row_group, path, column, footer))
        case ".json":
            raise InputError(
                f"{path} is one list, which cannot be read in part; write a row a line into a .jsonl file, or `stream: false`"
            )
        case _:
            raise unknown_kind(path)


def _stretches(path: Path, size: int, read: Callable[[Path, int, int], Iterator[Cell]]) -> Sections:
    """Stretches of a file; `read` takes where one starts and how many bytes it has."""
    with readable(path):
        count = -(-path.stat().st_size // size)

    def rows(number: int) -> Iterator[Cell]:
        with readable(path):
            yield from read(path, number * size, size)

    return Sections(count, rows)


def _json_lines(column: Column | Columns, path: Path, start: int, size: int) -> Iterator[Cell]:
    """Rows whose lines begin in the stretch."""
    with path.open("rb") as file:
        file.seek(max(0, start - 1))
        if start and not file.readline(size).endswith(b"\n"):
            return  # one line goes on through the whole stretch
        while (at := file.tell()) < start + size and (line := file.readline(_LINE + 1)):
            where = f"{path}, line at byte {at}"
            if len(line) > _LINE:
                raise InputError(
                    f"{where} is longer than {_LINE} bytes; write a row a line, in rows no longer than that, or `stream: false`"
                )
            yield from row_of(line, column, where)


def _text(path: Path, start: int, size: int) -> Iterator[Cell]:
    """One row: the lines that begin in the stretch. In a line as long as that, the stretch ends between any two characters."""
    before = min(1, start)
    with path.open("rb") as file:
        file.seek(start - before)
        data = file.read(before + 2 * size)
    first = _cut(data[: before + size]) if start else 0
    last = before + size - 1 + _cut(data[before + size - 1 :])
    if text := data[first:last]:
        where = f"{path}, from byte {start - before + first}"
        yield Cell(decode(text, where), where)


def _cut(data: bytes) -> int:
    """Where the first line after the first byte begins; without one, the first character after it. At most `len(data)`."""
    line = data.find(b"\n") + 1
    if line:
        return line
    place = 1
    while place < len(data) and data[place] & 0xC0 == 0x80:  # a later byte of a character in UTF-8
        place += 1
    return min(place, len(data))


def _values(batch: Any, name: str) -> list[object]:
    values: list[object] = batch.column(name).to_pylist()
    return values


def _row_group(path: Path, column: Column | Columns, footer: Footer, group: int) -> Iterator[Cell]:
    with readable(path), open_parquet(path, column, footer) as file:
        batches = file.iter_batches(_ROWS, row_groups=[group], columns=list(column.names))
        values = (value for batch in batches for value in column.values(partial(_values, batch)))
        for number, value in enumerate(values, start=1):
            yield Cell(value, f"{path}, row group {group + 1}, row {number}")
