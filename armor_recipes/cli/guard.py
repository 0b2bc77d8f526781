"""Turns whatever ends a command into a message and a documented exit code."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import typer

from armor_recipes.errors import ArmorError

INTERRUPTED, TERMINATED, BUG, USAGE = 130, 143, 1, 2


class TerminatedError(BaseException):
    """SIGTERM arrived. Not an Exception: nothing between the signal and the exit may swallow it."""


def run_command(app: typer.Typer, *, name: str) -> NoReturn:
    """Run a typer app and exit with the code of `docs/cli.md`; no traceback reaches a user but for a bug here."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with _terminate_as_exception():
        code = _guarded(lambda: _flushed(app(prog_name=name, standalone_mode=False)))
    sys.exit(code)


def _flushed(code: object) -> object:
    sys.stdout.flush()  # here, where a reader that is gone (`| head`) is still our business
    return code


def _guarded(command: Callable[[], object]) -> int:
    try:
        code = command()
    except ArmorError as error:
        return _complain(f"error: {error}", error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        code = INTERRUPTED
    except TerminatedError:
        return _complain("terminated; nothing half-written was left behind", TERMINATED)
    except (BrokenPipeError, SystemExit):  # click and rich make a SystemExit of a reader that is gone (`| head`)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more as it ends
        return 0
    except Exception as error:
        if hasattr(error, "format_message") and hasattr(error, "show"):
            error.show()
            return USAGE
        traceback.print_exc()
        return _complain(
            f"this is a bug in armor-recipes ({type(error).__name__}); please report it with the recipe", BUG
        )
    if code == INTERRUPTED:  # typer makes this code of a KeyboardInterrupt, without a word
        return _complain("interrupted; nothing half-written was left behind", INTERRUPTED)
    return code if isinstance(code, int) else 0


def _complain(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


@contextmanager
def _terminate_as_exception() -> Iterator[None]:
    def stop(_signal: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut the cleaning up short
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
