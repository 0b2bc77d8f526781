"""Documents of a dataset: from the hub, from local files, or from inside the package."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from armor_recipes import builtin
from armor_recipes.calibration.chat import is_left_out, messages_of
from armor_recipes.calibration.files import SUFFIXES, TENSORS, Cell, Column, Columns, read_path, readable, shown
from armor_recipes.calibration.hub import read_hub
from armor_recipes.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILTIN = "builtin:"
RANDOM_TOKENS = "builtin:random-tokens"
RANDOM_INPUTS = "builtin:random-inputs"
CONTINUATIONS = "builtin:continuations"
_SOON_READ = 100_000_000
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Documents:
    """The rows of a dataset as text, in its order; a row is empty if it is null or nothing but white space."""

    rows: tuple[str, ...]

    @property
    def documents(self) -> tuple[str, ...]:
        """The rows that are not empty."""
        return tuple(row for row in self.rows if not is_empty(row))

    @property
    def empty(self) -> int:
        """How many rows are empty."""
        return sum(map(is_empty, self.rows))


def is_empty(row: str) -> bool:
    """Whether a row is nothing but white space."""
    return not row or row.isspace()


def load_documents(
    dataset: str,
    *,
    split: str,
    text_column: str,
    messages_column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Documents:
    """Read all documents of a dataset.

    Args:
        dataset: `builtin:NAME`; a path to a .txt or .md file (one document), a .jsonl, .json or .parquet file, or a
            folder of these; or a hub id, its configuration after a colon (`Salesforce/wikitext:wikitext-2-raw-v1`).
        split: split of a hub dataset, slices included (`train[:1%]`); local files have none.
        text_column: column that holds the text; plain text has no columns.
        messages_column: column that holds chat messages, written out by the tokenizer's chat template. It wins over
            `text_column`.
        tokenizer: needed with `messages_column` only.

    Raises:
        InputError: the dataset cannot be read, a row holds something else than text or messages, or nothing is left.

    """
    column, text = reader(text_column, messages_column, tokenizer)
    found = Documents(tuple(map(text, cells(dataset, split, column))))
    if not found.documents:
        raise no_text(dataset, found.empty, messages_column)
    return found


def no_text(dataset: str, empty: int, messages_column: str | None) -> InputError:
    """Return the error for a dataset of which all rows that were read, `empty` of them, are empty."""
    key = "text_column" if messages_column is None else "messages_column"
    return InputError(f"{dataset} holds no text: {empty} rows, all of them empty; name another dataset or `{key}`")


def reader(
    text_column: str, messages_column: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[Column, Callable[[Cell], str]]:
    """The column that is read, and what makes text of its values: an empty one of a row that is null.

    Raises InputError for messages without a chat template; what is returned does for values that are neither text nor messages.
    """
    if messages_column is None:
        return Column(text_column, "text_column"), _plain
    column = Column(messages_column, "messages_column")
    return column, partial(_chat, _with_template(tokenizer, column))


def cells(dataset: str, split: str, column: Column | Columns) -> Iterable[Cell]:
    """All rows of a dataset. Raises InputError."""
    if dataset.startswith(BUILTIN):
        return builtin_rows(dataset, column)
    path = local_path(dataset)
    return read_hub(dataset, split, column) if path is None else read_path(path, column)


def is_soon_read(dataset: str) -> bool:
    """Whether reading a dataset takes no more than seconds: a text inside the package, or local files that are not large."""
    if dataset.startswith(BUILTIN):
        return True
    try:
        path = local_path(dataset)
        files = [] if path is None else [path, *path.rglob("*")]
        return path is not None and sum(file.stat().st_size for file in files if file.is_file()) <= _SOON_READ
    except (InputError, OSError):
        return True  # which reading it tells


def check_there(dataset: str) -> None:
    """Raise InputError where a dataset is no text inside the package, or a path at which nothing is; a hub id is not looked up."""
    if dataset.startswith(BUILTIN):
        if dataset not in (RANDOM_TOKENS, RANDOM_INPUTS, CONTINUATIONS):
            builtin.check_text(dataset.removeprefix(BUILTIN))
        return
    path = local_path(dataset)
    if path is not None:
        with readable(path):
            path.stat()


def local_path(dataset: str) -> Path | None:
    """Return the path that `dataset` means, or None if it is a hub id. Raises InputError for what can be neither."""
    if not dataset.isprintable():
        raise InputError(
            f"{dataset[:80]!r} is neither a path nor a hub id: it has control characters; correct the dataset"
        )
    if "://" in dataset:
        raise InputError(f"{dataset!r} is an address, which is not read; download the file and name it")
    try:
        path = Path(dataset).expanduser()
        looks_local = (
            dataset.startswith((".", "~")) or path.is_absolute() or path.suffix.lower() in (*SUFFIXES, *TENSORS)
        )
        return path if looks_local or path.exists() else None
    except (OSError, ValueError, RuntimeError) as error:  # too long, a null byte, an unknown home folder
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{dataset[:80]!r} is neither a path nor a hub id: {reason}; correct the dataset") from error


def builtin_rows(dataset: str, column: Column | Columns) -> Iterator[Cell]:
    """Documents of a text inside the package. Raises InputError if it is none, or has no text."""
    if dataset == RANDOM_TOKENS:
        raise InputError(
            f"{RANDOM_TOKENS} is tokens without text and serves for calibration only; name a text such as builtin:pydoc"
        )
    if dataset == RANDOM_INPUTS:
        raise InputError(f"{RANDOM_INPUTS} is numbers without text; name a text such as builtin:pydoc")
    if dataset == CONTINUATIONS:
        places = ((row, f"{dataset}, row {number}") for number, row in enumerate(builtin.continuations(), start=1))
        return (Cell(column.of(row, where), where) for row, where in places)
    column.check_plain(dataset)
    texts = builtin.documents(dataset.removeprefix(BUILTIN))
    return (Cell(text, f"{dataset}, document {number}") for number, text in enumerate(texts, start=1))


def _plain(cell: Cell) -> str:
    if cell.value is None:
        return ""
    if not isinstance(cell.value, str):
        kind = type(cell.value).__name__
        raise InputError(
            f"{cell.where}: the text column holds {shown(cell.value)} ({kind}), not text; name another `text_column`"
        )
    return encodable(cell.value, cell.where)


def _chat(tokenizer: PreTrainedTokenizerBase, cell: Cell) -> str:
    """Write a conversation out by the chat template; a missing conversation is an empty row."""
    messages = messages_of(cell)
    if not messages:
        return ""
    try:
        written = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception as error:  # a template is a program that comes with the tokenizer, and raises what it likes
        raise InputError(
            f"{cell.where}: the chat template refuses the messages: {error}; correct or remove the row"
        ) from error
    if is_left_out(messages, written):
        raise InputError(
            f"{cell.where}: the chat template writes {shown(written)}, without a word of the messages, as one for images and text "
            "does with plain text; give the tokenizer a template for text, or use `text_column`"
        )
    return encodable(written, cell.where)


def _with_template(tokenizer: PreTrainedTokenizerBase | None, column: Column) -> PreTrainedTokenizerBase:
    if tokenizer is None or tokenizer.chat_template is None:
        what = "there is no tokenizer" if tokenizer is None else "the tokenizer has no chat template"
        raise InputError(
            f"`messages_column` {column.name!r} cannot be used: {what}; use `text_column`, or an instruct model"
        )
    return tokenizer


def encodable(text: str, where: str) -> str:
    """The text. Raises InputError where it holds half of a surrogate pair, which no tokenizer takes."""
    if not text.isascii() and (found := _SURROGATE.search(text)):  # JSON can spell half of a surrogate pair
        raise InputError(
            f"{where}: character {found.start()} is a lone surrogate, which is not text; correct or remove it"
        )
    return text
