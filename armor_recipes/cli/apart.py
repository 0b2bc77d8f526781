"""A run in a process of its own: its peak of memory is its own, and a system that ends it ends nothing else."""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from types import FrameType
from typing import TYPE_CHECKING, Any

from armor_recipes.cli.loading import loading
from armor_recipes.errors import ArmorError, ResourceError
from armor_recipes.events import Event, Observer

if TYPE_CHECKING:
    from armor_recipes.recipe import Recipe


@dataclass(frozen=True, slots=True)
class _Ended:
    """How the run ended: well, or by an error of that class."""

    kind: type[ArmorError] | None = None
    text: str = ""


class _StoppedError(BaseException):
    """The run is no longer wanted; not an Exception, so that its journal stays."""


def run_apart(recipe: Recipe, device: str, overwrite: bool, fresh: bool, observer: Observer) -> None:
    """Run a recipe, and pass its events on. Where this process is interrupted, so is the run: it keeps its journal.

    Raises the run's ArmorError, ResourceError where the system ended it.
    """
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sender, recipe, device, overwrite, fresh))
    process.start()
    sender.close()
    ended = None
    try:
        for message in _messages(receiver):
            if isinstance(message, _Ended):
                ended = message
            else:
                observer(message)
    except BaseException:
        process.terminate()
        for _ in _messages(receiver):  # what it has to say until it has tidied up
            pass
        raise
    finally:
        process.join()
    if ended is None:
        raise ResourceError(_lost(process.exitcode))
    if ended.kind is not None:
        raise ended.kind(ended.text)


def _messages(receiver: Connection[Any, Any]) -> Iterator[Any]:
    """What comes until the other end is closed."""
    while True:
        try:
            yield receiver.recv()
        except EOFError:
            return


def _lost(code: int | None) -> str:
    how = f"with exit code {code}"
    if code is not None and code < 0:
        how = f"by signal {-code} ({signal.Signals(-code).name}), as the system does where memory runs out"
    return f"the run's process was ended {how}: the same command goes on from its journal"


def _run(sender: Connection[Any, Any], recipe: Recipe, device: str, overwrite: bool, fresh: bool) -> None:
    """What the process does."""
    for name in ("SIGINT", "SIGHUP"):  # a terminal sends them to both; the other process says when to end
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _stop)
    with loading():
        from armor_recipes.cli.quiet import quiet_libraries
        from armor_recipes.run.sweep import work_here

    def observe(event: Event) -> None:
        try:
            sender.send(event)
        except OSError as error:  # the other process is gone
            raise _StoppedError from error

    ended = _Ended()
    try:
        quiet_libraries()
        work_here(recipe, device, overwrite, fresh=fresh, observer=observe)
    except ArmorError as error:
        ended = _Ended(type(error), str(error))
    except _StoppedError:
        return
    except Exception as error:
        traceback.print_exc()
        ended = _Ended(
            ArmorError, f"this is a bug in armor-recipes ({type(error).__name__}: {error}); please report it"
        )
    sender.send(ended)


def _stop(_number: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise _StoppedError
