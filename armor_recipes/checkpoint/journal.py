"""The journal of a run, on disk: a folder beside its output, `out/.model.journal` for `out/model`.

- `records.jsonl` is only ever appended to, a line of JSON for each record. Each line ends with the SHA-256 of itself and of
  the line before, so that a torn line, or one that was edited, is no record, and neither is any line behind it.
- Tensors lie in files of their own, each written under another name, flushed, renamed and flushed again before the line that
  names it and its SHA-256 is appended and flushed. So a record is there with all that it names, or it is not there.
- One process writes: the one that holds the output's lock (`checkpoint/lock.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from armor_recipes.checkpoint.staging import discard, sync
from armor_recipes.checkpoint.writer import file_hash
from armor_recipes.errors import CheckpointError

RECORDS_FILE = "records.jsonl"
_CHECK = "check"

Record = Mapping[str, Any]


def journal_folder(output: Path) -> Path:
    """The folder of an output's journal; `output` without links."""
    return output.with_name(f".{output.name}.journal")


def output_of(folder: Path) -> Path:
    """The output that a journal's folder is of."""
    return folder.with_name(folder.name.removeprefix(".").removesuffix(".journal"))


def read_records(folder: Path) -> tuple[list[Record], int, int]:
    """The whole records, the bytes that their lines take, and how many lines follow that are none. Without a journal all is empty.

    Raises OSError where the file cannot be read.
    """
    try:
        content = (folder / RECORDS_FILE).read_bytes()
    except FileNotFoundError:
        return [], 0, 0
    records: list[Record] = []
    size, check = 0, ""
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines):
        record = _record(line, check)
        if record is None:
            return records, size, len(lines) - number
        check, size = record.pop(_CHECK), size + len(line)
        records.append(record)
    return records, size, 0


def _record(line: bytes, before: str) -> dict[str, Any] | None:
    """The record of a line that follows one with that check; None where it is not whole."""
    try:
        found = json.loads(line) if line.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get(_CHECK), str):
        return None
    whole = _line({name: value for name, value in found.items() if name != _CHECK}, before)[0] == line
    return found if whole else None


def _line(record: Record, before: str) -> tuple[bytes, str]:
    text = json.dumps(record, separators=(",", ":"))
    check = hashlib.sha256(f"{before}{text}".encode()).hexdigest()
    return (json.dumps({**record, _CHECK: check}, separators=(",", ":")) + "\n").encode(), check


class JournalFiles:
    """The records of a journal and the files that they name. What is not whole is cut off by `trim`, before anything is added.

    Attributes:
        records: the whole records, in order.
        torn: how many lines behind them were none.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._check = ""
        self.records, self._size, self.torn = read_records(folder)

    def trim(self) -> None:
        """Cut off what is not whole."""
        self._cut(self._size)

    def append(self, record: Record) -> None:
        """Add a record, and flush it. Raises OSError: then it is not there, and all others are."""
        if not self.folder.exists():
            self.folder.mkdir()
            sync(self.folder.parent)
        line, check = _line(record, self._check)
        file = self.folder / RECORDS_FILE
        size = file.stat().st_size if file.exists() else 0
        try:
            with file.open("ab") as opened:
                opened.write(line)
                opened.flush()
                os.fsync(opened.fileno())
            sync(self.folder)
        except BaseException:
            with contextlib.suppress(OSError):  # what is torn is cut off when the journal is opened again
                os.truncate(file, size)
            raise
        self.records.append(record)
        self._check = check

    def write(self, name: str, save: Callable[[Path], None]) -> dict[str, str]:
        """Let `save` write a file, flushed before it has its name; returns what a record says of it. Raises OSError."""
        self.folder.mkdir(exist_ok=True)
        file, beside = self.folder / name, self.folder / f".{name}"
        try:
            save(beside)
            sync(beside)
            found = file_hash(beside)
            beside.replace(file)
            sync(self.folder)
        finally:
            beside.unlink(missing_ok=True)
        return {"file": name, "sha256": found}

    def took(self, file: Path) -> dict[str, str]:
        """What a record says of a file that lies in the folder already; it is flushed."""
        sync(file)
        return {"file": file.name, "sha256": file_hash(file)}

    def is_whole(self, record: Record) -> bool:
        """Whether the file that a record names is there as it was written."""
        name, wanted = record.get("file"), record.get("sha256")
        if not isinstance(name, str) or Path(name).name != name:
            return False
        try:
            return file_hash(self.folder / name) == wanted
        except CheckpointError:
            return False

    def cut(self, count: int) -> None:
        """Forget the records behind the first so many."""
        check, size = "", 0
        for record in self.records[:count]:
            line, check = _line(record, check)
            size += len(line)
        del self.records[count:]
        self._cut(size)

    def remove(self) -> None:
        """All of it in one step: a removal that is cut short leaves no part of a journal."""
        self.records.clear()
        self._check = ""
        discard(self.folder, output_of(self.folder))

    def _cut(self, size: int) -> None:
        file = self.folder / RECORDS_FILE
        if file.exists() and file.stat().st_size > size:
            os.truncate(file, size)
        self._check = ""
        for record in self.records:
            self._check = _line(record, self._check)[1]
