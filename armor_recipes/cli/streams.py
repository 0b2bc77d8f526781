"""Standard output and error of a command: nobody who stops reading, and no encoding, ends the run behind them."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EIO
from typing import Any

from armor_recipes.errors import ArmorError, ResourceError


@contextmanager
def patient_output() -> Iterator[None]:
    """Until the block ends, what is printed to a reader that is gone is dropped, and what cannot be encoded is escaped.

    Only streams with a descriptor of their own are replaced: not those of a test or a notebook. A descriptor whose reader is
    gone is pointed to nowhere for good, so that compiled libraries and the interpreter's last flush do not meet it either.
    """
    before = sys.stdout, sys.stderr
    try:
        sys.stdout, sys.stderr = _patient(before[0], essential=True), _patient(before[1], essential=False)
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(ArmorError, OSError, ValueError):  # the code of the command is settled by now
                flush(stream)
        sys.stdout, sys.stderr = before


def flush(stream: Any) -> None:
    """Write what a stream still holds. Raises ResourceError for results that cannot be written."""
    if stream is not None:  # None: it was closed when the process started (`>&-`)
        stream.flush()


def _patient(stream: Any, *, essential: bool) -> Any:
    if stream is None:
        _occupy(1 if essential else 2)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    with contextlib.suppress(OSError):
        stream.flush()
    try:
        raw = _PatientFile(stream.fileno(), essential=essential)
    except (OSError, ValueError):  # no descriptor: a stream in memory
        return stream
    raw.name = stream.name
    return io.TextIOWrapper(
        raw if stream.write_through else io.BufferedWriter(raw),  # as the interpreter does for -u
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _occupy(number: int) -> None:
    """Open nothing under the free number of a closed stream, which the next file would get, with all that C code prints."""
    while os.open(os.devnull, os.O_RDWR) < number:
        pass


class _PatientFile(io.FileIO):
    """Writes to a descriptor that is somebody else's to close, for as long as that goes well, and then to nowhere.

    An essential one (results) says so unless its reader is gone, any other (progress) is silent: to end a run of hours because
    its log is full would lose more.
    """

    def __init__(self, descriptor: int, *, essential: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.essential = essential
        self.terminal = self.isatty()

    def write(self, data: Any, /) -> int:
        """Write all of `data`. Raises ResourceError for results that cannot be written."""
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left:
                left = left[self._write_some(left) :]
        except OSError as error:
            self._divert()
            gone = isinstance(error, ConnectionError) or (error.errno == EIO and self.terminal)
            if self.essential and not gone:
                raise ResourceError(
                    f"results cannot be written to standard output: {error.strerror}; free some space there, or send them "
                    "elsewhere. A checkpoint that was put in place by then stays, and is complete"
                ) from error
        return size

    def _write_some(self, data: memoryview) -> int:
        written = super().write(data)
        if written is None:  # somebody has made the descriptor non-blocking, and its reader is slow
            select.select([], [self], [])
        return written or 0

    def _divert(self) -> None:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.fileno())
        os.close(nowhere)
