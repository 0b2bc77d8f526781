"""Rows of hub datasets, by the `datasets` library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from armor_recipes.calibration.files import SUFFIXES, Cell, Column, Columns
from armor_recipes.calibration.sections import Sections
from armor_recipes.errors import InputError


def read_hub(dataset: str, split: str, column: Column | Columns) -> Iterator[Cell]:
    """All rows of a split, which is downloaded whole. Raises InputError."""
    import datasets

    name, _, configuration = dataset.partition(":")
    with _loading(dataset, split):
        table = datasets.load_dataset(name, configuration or None, split=split)
    column.check_among(tuple(table.column_names), f"hub dataset {dataset!r}")
    with _loading(dataset, split):
        table = _undecoded(table, column)
        values = column.values(lambda name: list(table[name]))
    return (Cell(value, f"{dataset}, row {number}") for number, value in enumerate(values, start=1))


def hub_sections(dataset: str, split: str, column: Column | Columns) -> Sections:
    """The files of a split as sections, which `datasets` calls shards: read over the network as rows are asked for.

    Raises InputError; for what is wrong with a row, or with the network by then, when it is read.
    """
    import datasets

    if "[" in split:
        raise InputError(
            f"hub dataset {dataset!r}: `split` {split!r} is a slice, and a stream has none; write a whole split, of which no more "
            "is read than the windows need, or `stream: false`, which downloads all of it first"
        )
    name, _, configuration = dataset.partition(":")
    with _loading(dataset, split):
        table = datasets.load_dataset(name, configuration or None, split=split, streaming=True)
        known, count = table.column_names, table.num_shards
    if known is not None:  # JSON has no list of columns: there each row is asked
        column.check_among(tuple(known), f"hub dataset {dataset!r}")
        table = _undecoded(table.select_columns(list(column.names)), column)
    return Sections(count, partial(_shard, table, dataset, column))


def _undecoded(table: Any, column: Column | Columns) -> Any:
    """A table whose images and sounds stay the bytes that they are, so that nothing is decoded that is not used."""
    import datasets

    for name in column.names:
        feature = (table.features or {}).get(name)
        if isinstance(feature, (datasets.Image, datasets.Audio)):
            table = table.cast_column(name, type(feature)(decode=False))
    return table


def _shard(table: Any, dataset: str, column: Column | Columns, number: int) -> Iterator[Cell]:
    where = f"{dataset}, shard {number + 1}"
    rows, read = iter(table.shard(num_shards=table.num_shards, index=number)), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # as in `_loading`
            raise InputError(
                f"{where} cannot be read on after {read} rows: {_reason(error)}; check the network and try again, or name a local "
                "file"
            ) from error
        read += 1
        yield Cell(column.of(row, f"{where}, row {read}"), f"{where}, row {read}")


@contextmanager
def _loading(dataset: str, split: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the hub client raises errors of many libraries, without a common base
        raise InputError(
            f"cannot load split {split!r} of hub dataset {dataset!r}: {_reason(error)}; check the name, the split and the "
            f"network, or name a local file ({', '.join(SUFFIXES)}) or a text inside the package such as builtin:pydoc"
        ) from error


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
