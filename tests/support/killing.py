"""A real `armor-apply` that is killed at a flush of its choice, in a process of its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from armor_recipes.checkpoint.staging import REPORT_FILES
from tests.support.commands import LISTEN, Done, finished, surroundings
from tests.support.forks import Forks

#: Counts calls of `fsync`: each journal write has some, and so has the checkpoint on its way to its place. At the one that is asked
#: for the process is killed: before it, after it, or so many seconds later.
PROGRAM = (
    LISTEN
    + """
import atexit, os, threading
from pathlib import Path
from armor_recipes.session import journal
journal.SNAPSHOT_SECONDS = float(os.environ["SNAPSHOT_SECONDS"])
real, count = os.fsync, 0
at, delay, told = int(os.environ["KILL_AT"]), float(os.environ["KILL_DELAY"]), Path(os.environ["TOLD"])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def fsync(descriptor):
    global count
    count += 1
    if count == at and delay < 0:
        die()
    real(descriptor)
    if count == at and delay == 0:
        die()
    if count == at:
        timer = threading.Timer(delay, die)
        timer.daemon = True
        timer.start()

os.fsync = fsync
atexit.register(lambda: told.write_text(str(count)))
from armor_recipes.cli.apply import main
main()
"""
)


@dataclass(frozen=True)
class Kill:
    """At which flush, and how many seconds after it; before it where that is negative."""

    at: int
    delay: float = 0.0


NEVER = Kill(0)


def run_killed(
    forks: Forks, folder: Path, *words: object, kill: Kill = NEVER, snapshot_seconds: float = 0.0
) -> tuple[Done, int]:
    """Run `armor-apply WORDS`; how it ended, and how many flushes there were, 0 where it was killed."""
    told = folder / "flushes"
    told.unlink(missing_ok=True)
    environment = {
        **surroundings(),
        "KILL_AT": str(kill.at),
        "KILL_DELAY": str(kill.delay),
        "SNAPSHOT_SECONDS": str(snapshot_seconds),
        "TOLD": str(told),
        "XDG_CACHE_HOME": f"{folder}-cache",
    }
    done = finished(forks.start(PROGRAM, *words, folder=folder, environment=environment))
    flushes = int(told.read_text()) if told.exists() else 0
    told.unlink(missing_ok=True)
    return done, flushes


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of each file that equal runs write equal."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in REPORT_FILES
    }
