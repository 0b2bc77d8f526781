"""Rows of local files: text, JSON, JSON lines and parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armor_recipes.errors import InputError

TEXT = (".txt", ".md")
SUFFIXES = (*TEXT, ".jsonl", ".json", ".parquet")
#: Files of named tensors, which have no rows.
TENSORS = (".safetensors",)

Footer = Callable[[Path], object]

#: Bytes of a parquet file that are held of each column where it is read in pieces.
_BUFFER = 1 << 16


@dataclass(frozen=True, slots=True)
class Column:
    """The column to read, and the recipe key (`text_column` or `messages_column`) that names it."""

    name: str
    key: str

    @property
    def names(self) -> tuple[str, ...]:
        """The name alone."""
        return (self.name,)

    def values(self, column: Callable[[str], list[object]]) -> list[object]:
        """A table's values, given what returns one of its columns."""
        return column(self.name)

    def of(self, row: Mapping[str, object], where: str) -> object:
        """Return the row's value. Raises InputError, listing the row's columns, if it has no such column."""
        if self.name not in row:
            raise self.missing(tuple(row), where)
        return row[self.name]

    def missing(self, known: tuple[str, ...], where: str) -> InputError:
        """Return the error that says which columns there are."""
        listed = ", ".join(known) or "none"
        return InputError(f"{where} has no column {self.name!r}; set `{self.key}` to one of its columns: {listed}")

    def check_among(self, names: tuple[str, ...], where: str) -> None:
        """Raise InputError unless exactly one of a table's columns has the name."""
        if self.name not in names:
            raise self.missing(names, where)
        if names.count(self.name) > 1:
            raise InputError(
                f"{where} has {names.count(self.name)} columns {self.name!r}; rename or remove all but one"
            )

    def check_plain(self, where: str) -> None:
        """Raise InputError if chat messages are wanted: plain text has no columns."""
        if self.key == "messages_column":
            raise InputError(
                f"{where} is plain text and has no `messages_column` {self.name!r}; write "
                "`messages_column: null` for it, or in a mix give it a `text_column` of its own"
            )


@dataclass(frozen=True, slots=True)
class Columns:
    """Several columns that are read together: a row's value is a tuple of theirs."""

    columns: tuple[Column, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Their names, in order."""
        return tuple(column.name for column in self.columns)

    def values(self, column: Callable[[str], list[object]]) -> list[object]:
        """A table's values, row by row, given what returns one of its columns."""
        return list(zip(*map(column, self.names), strict=True))

    def of(self, row: Mapping[str, object], where: str) -> object:
        """Return the row's values. Raises InputError if it lacks a column."""
        return tuple(column.of(row, where) for column in self.columns)

    def check_among(self, names: tuple[str, ...], where: str) -> None:
        """Raise InputError unless exactly one of a table's columns has each name."""
        for column in self.columns:
            column.check_among(names, where)

    def check_plain(self, where: str) -> None:
        """Raise InputError: plain text has no columns."""
        keys = " and ".join(f"`{column.key}`" for column in self.columns)
        raise InputError(
            f"{where} is plain text and has no {keys}; name a .jsonl, .json or .parquet file that has them"
        )


@dataclass(frozen=True, slots=True)
class Cell:
    """One value of the column, and where it stands (file and line or row, counted from 1)."""

    value: object
    where: str


def shown(value: object) -> str:
    """Return a value as messages show it, in at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


def read_path(path: Path, column: Column | Columns) -> Iterator[Cell]:
    """Rows of a file, or of all files of a folder and its sub-folders, sorted by path. Hidden files are passed over.

    Raises InputError for a missing path, a kind of file that is not read, and everything wrong inside.
    """
    for place in files_of(path):
        with readable(place):
            yield from _read_file(place, column)


@contextmanager
def readable(place: Path) -> Iterator[None]:
    """Raise an InputError that names the path in place of an OSError."""
    try:
        yield
    except OSError as error:
        named = error.filename or place
        raise InputError(
            f"cannot read {named}: {error.strerror or error}; check the path and its permissions"
        ) from error


def files_of(path: Path) -> list[Path]:
    """A file itself, or all visible files of a folder and its sub-folders, sorted by path. Raises InputError."""
    with readable(path):
        if not path.is_dir():
            _check_file(path)
            return [path]
        files = list(_inside(path, frozenset()))
    if not files:
        raise InputError(f"the folder {path} holds no files; put {_listed()} files into it")
    return files


def _inside(folder: Path, above: frozenset[Path]) -> Iterator[Path]:
    """Visible files of a folder and its sub-folders in the order of their paths; `above` are the folders that it lies in."""
    above |= {folder.resolve()}
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if not entry.is_dir():
            _check_file(entry)
            yield entry
        elif entry.resolve() in above:
            raise InputError(f"the folder {entry} is a link to a folder that it lies in; remove it")
        else:
            yield from _inside(entry, above)


def _check_file(path: Path) -> None:
    """Raise InputError for what is not there, and for pipes and devices, which may never end."""
    if path.is_file():
        return
    if path.exists():
        raise InputError(f"{path} is a pipe or a device, not a file; write its text to a file and name that")
    if path.is_symlink():
        raise InputError(f"{path} is a link that leads nowhere; mend or remove it")
    raise InputError(f"no such file or folder: {path}; a relative path starts at the recipe that names it")


def _read_file(path: Path, column: Column | Columns) -> Iterator[Cell]:
    match path.suffix.lower():
        case ".txt" | ".md":
            yield _whole_file(path, column)
        case ".jsonl":
            yield from _json_lines(path, column)
        case ".json":
            yield from _json_list(path, column)
        case ".parquet":
            yield from _parquet(path, column)
        case _:
            raise unknown_kind(path)


def unknown_kind(path: Path) -> InputError:
    """Return the error for a file of a kind that is not read."""
    return InputError(
        f"cannot read {path}: {path.suffix.lower() or 'no suffix'} is none of {_listed()}; convert or remove the file"
    )


def _listed() -> str:
    return ", ".join(SUFFIXES)


def _whole_file(path: Path, column: Column | Columns) -> Cell:
    column.check_plain(str(path))
    return Cell(decode(path.read_bytes(), str(path)), str(path))


def decode(data: bytes, where: str) -> str:
    """Return bytes as text, without a byte order mark at their start. Raises InputError if they are not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where} is not UTF-8: byte {error.start} is 0x{data[error.start]:02x} ({error.reason}); "
            "convert it to UTF-8"
        ) from error


def _json_lines(path: Path, column: Column | Columns) -> Iterator[Cell]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            yield from row_of(line, column, f"{path}:{number}")


def row_of(line: bytes, column: Column | Columns, where: str) -> Iterator[Cell]:
    """The row that a line of JSON holds; none, if it is blank. Raises InputError."""
    text = decode(line, where)
    if text.strip():
        yield _cell(_parse(text, where), column, where)


def _json_list(path: Path, column: Column | Columns) -> Iterator[Cell]:
    rows = _parse(decode(path.read_bytes(), str(path)), str(path))
    if not isinstance(rows, list):
        raise InputError(
            f"{path} holds {_kind(rows)}, not a list of objects; write a list, or one object a line in a .jsonl file"
        )
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield _cell(row, column, where)


def _cell(row: object, column: Column | Columns, where: str) -> Cell:
    if not isinstance(row, dict):
        raise InputError(f'{where} is {_kind(row)}, not an object; write rows as {{"{column.names[0]}": …}}')
    return Cell(column.of(row, where), where)


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        hint = (
            "; a file with one object a line is named .jsonl" if error.msg == "Extra data" and error.lineno > 1 else ""
        )
        raise InputError(f"{where} is not JSON: {error.msg} at {place}; correct or remove it{hint}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, a key twice, or nested too deep
        raise InputError(f"{where} cannot be read as JSON: {error}; correct or remove it") from error


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object of JSON. Raises ValueError for a key that stands in it twice: which value is meant is not known."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in {shown(pairs)}")
    return found


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


def _parquet(path: Path, column: Column | Columns) -> Iterator[Cell]:
    with open_parquet(path, column) as file:
        table = file.read(columns=list(column.names))
        values = column.values(lambda name: table.column(name).to_pylist())
    for number, value in enumerate(values, start=1):
        yield Cell(value, f"{path}, row {number}")


@contextmanager
def open_parquet(path: Path, column: Column | Columns, footer: Footer | None = None) -> Iterator[Any]:
    """A `ParquetFile` that has the column, once. With a `footer` given, it is read a few pages at a time instead of whole.

    Raises InputError, also for what goes wrong while the file is read.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        pieces = {} if footer is None else {"metadata": footer(path), "buffer_size": _BUFFER, "pre_buffer": False}
        with parquet.ParquetFile(path, **pieces) as file:
            column.check_among(tuple(file.schema_arrow.names), str(path))
            yield file
    except (
        pa.ArrowException,
        ValueError,
        OverflowError,
    ) as error:  # Python's own are of values that it has no form for
        raise InputError(f"cannot read {path} as parquet: {error}; write the file again") from error


def read_footer(path: Path) -> object:
    """What a parquet file says of its row groups: megabytes, where there are thousands or many columns."""
    from pyarrow import parquet

    return parquet.read_metadata(path)
