"""Turns whatever ends a command into a message and a documented exit code."""

from __future__ import annotations

import functools
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import typer

from armor_recipes.cli.streams import flush, patient_output
from armor_recipes.errors import ArmorError, InputError, RecipeError, ResourceError
from armor_recipes.exhaustion import what_ran_out
from armor_recipes.paths import no_path

INTERRUPTED, TERMINATED, HUNG_UP, BUG, USAGE = 130, 143, 129, 1, 2


class TerminatedError(BaseException):
    """SIGTERM or SIGHUP arrived. Not an Exception: nothing between the signal and the exit may swallow it."""

    def __init__(self, word: str, code: int) -> None:
        super().__init__(word)
        self.word = word
        self.code = code


class _EndedError(BaseException):
    """What ended a command's own code, wrapped: typer has meanings of its own for interrupts, EOFError, Exit and others."""

    def __init__(self, error: BaseException) -> None:
        super().__init__(error)
        self.error = error


def run_command(app: typer.Typer, *, name: str) -> NoReturn:
    """Run a typer app and exit with the code of `docs/cli.md`; no traceback reaches a user but for a bug here."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with patient_output():
        code = _guarded(lambda: _run(app, name))
    sys.exit(code)


def _run(app: typer.Typer, name: str) -> object:
    with _ends_as_exceptions():
        try:
            code = _command(app).main(prog_name=name, standalone_mode=False)
        except (
            OSError
        ) as error:  # of typer's own, which writes a shell's completion: those of commands are kept from it
            raise RecipeError(f"{error.filename or 'a file'} cannot be used ({error.strerror})") from error
        except (KeyError, ValueError) as error:
            if f"_{name.upper().replace('-', '_')}_COMPLETE" not in os.environ:
                raise
            raise RecipeError(  # typer's own, too: what it was asked to complete stands in variables
                f"environment variables COMP_WORDS and COMP_CWORD: completion needs both, the second a number ({error}); let the "
                f"shell ask for it, see `{name} --install-completion`"
            ) from error
        flush(sys.stdout)  # here, where results that cannot be written are still our business
        return code


def _command(app: typer.Typer) -> Any:
    """The parser, and behind it the commands with their errors kept from typer."""
    root: Any = typer.main.get_command(app)
    for command in getattr(root, "commands", {"": root}).values():
        command.callback = _with_its_own_end(command.callback)
    return root


def _with_its_own_end(callback: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(callback)
    def run(*args: Any, **options: Any) -> None:
        try:
            callback(*args, **options)
        except BaseException as error:
            raise _EndedError(error) from error

    return run


def _guarded(command: Callable[[], object]) -> int:
    try:
        code = command()
    except _EndedError as ended:
        return _code_of(ended.error)
    except typer.Abort:  # an interrupt that click met before the command began
        return _code_of(KeyboardInterrupt())
    except SystemExit as ended:  # of typer's own: completion was shown or installed
        return ended.code if isinstance(ended.code, int) else 0
    except BaseException as error:
        if hasattr(error, "format_message") and hasattr(error, "show"):
            error.show()
            if error.format_message().startswith("No such command"):
                return _complain("To run a recipe: armor-apply RECIPE", USAGE)
            return USAGE
        return _code_of(error)
    if code == INTERRUPTED:  # typer makes this code of it, without a word
        return _code_of(KeyboardInterrupt())
    return code if isinstance(code, int) else 0


def _code_of(error: BaseException) -> int:
    """Say what ended the command, and return its exit code."""
    match error:
        case ArmorError():
            kind = ResourceError if what_ran_out(error) else type(error)
            return _complain(f"error: {error} (see {kind.page()})", kind.exit_code)
        case KeyboardInterrupt():
            return _complain(f"interrupted; {_left(error)}", INTERRUPTED)
        case TerminatedError():
            return _complain(f"{error.word}; {_left(error)}", error.code)
        case SystemExit():
            return _complain(
                f"error: something called sys.exit({error.code!r}) in the middle of the run, which ended it: {_place(error)}; "
                f"{_left(error)}. Mend or uninstall the plug-in or library that did",
                BUG,
            )
    what = what_ran_out(error)
    if what:
        return _complain(f"error: {what} (see {ResourceError.page()})", ResourceError.exit_code)
    what = no_path(error)
    if what:
        return _complain(f"error: {what} (see {InputError.page()})", InputError.exit_code)
    traceback.print_exception(error)
    return _complain(f"this is a bug in armor-recipes ({type(error).__name__}); please report it with the recipe", BUG)


def _left(error: BaseException) -> str:
    """What an end leaves behind: nothing, or what a note of the error names."""
    return "; ".join(getattr(error, "__notes__", ())) or "nothing half-written was left behind"


def _place(error: BaseException) -> str:
    """Where an error was raised, as file and line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    return f"{frames[-1].filename}, line {frames[-1].lineno}"


def _complain(message: str, code: int) -> int:
    if sys.stderr is not None:  # else print would take standard output, where results are expected
        print(message, file=sys.stderr)
    return code


@contextmanager
def _ends_as_exceptions() -> Iterator[None]:
    """Raise what ends a command from outside, once; signals that are ignored (`nohup`, a job in the background) stay so."""
    ends = {
        number: error for number, error in _ends().items() if signal.getsignal(number) not in (signal.SIG_IGN, None)
    }

    def stop(number: int, _frame: FrameType | None) -> None:
        for other in ends:
            signal.signal(
                other, signal.SIG_IGN
            )  # a second one must cut short neither the cleaning up nor the exit code
        raise ends[number]

    before = {number: signal.signal(number, stop) for number in ends}
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is stop:
                signal.signal(number, handler)


def _ends() -> dict[int, BaseException]:
    found: dict[int, BaseException] = {
        signal.SIGINT: KeyboardInterrupt(),
        signal.SIGTERM: TerminatedError("terminated", TERMINATED),
    }
    if hasattr(signal, "SIGHUP"):  # not on Windows
        found[signal.SIGHUP] = TerminatedError("the terminal was closed", HUNG_UP)
    return found
