"""A real `armor-apply` that is killed at a flush of its choice, in a process of its own, also by a machine that loses its power."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
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
import atexit, json, os, shutil, stat, threading
from pathlib import Path
from armor_recipes.session import journal
journal.SNAPSHOT_SECONDS = float(os.environ["SNAPSHOT_SECONDS"])
real, count = os.fsync, 0
at, delay, told = int(os.environ["KILL_AT"]), float(os.environ["KILL_DELAY"]), Path(os.environ["TOLD"])
disk, held = os.environ.get("DISK") and Path(os.environ["DISK"]), {}

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def keep(descriptor):
    # What this flush puts on the disk, by the number of file or folder, which is held so that no other gets it.
    state = os.fstat(descriptor)
    if state.st_ino not in held:
        held[state.st_ino] = os.dup(descriptor)
    beside, place = disk / "new", disk / f"{state.st_ino}.{'names' if stat.S_ISDIR(state.st_mode) else 'content'}"
    if stat.S_ISDIR(state.st_mode):
        numbers = {name: os.stat(name, dir_fd=descriptor).st_ino for name in os.listdir(descriptor)}
        beside.write_text(json.dumps(numbers))
    else:
        shutil.copyfile(f"/proc/self/fd/{descriptor}", beside)
    beside.replace(place)

def fsync(descriptor):
    global count
    count += 1
    if count == at and delay < 0:
        die()
    real(descriptor)
    if disk:
        keep(descriptor)
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


class Disk:
    """What of a folder is on the disk for certain: what was there at first, and what was flushed since then.

    A file's content and a folder's names are flushed each by itself, and lie in `place` by their inode numbers.
    """

    def __init__(self, folder: Path, place: Path) -> None:
        self.folder, self.place = folder, place
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        self.root = folder.stat().st_ino
        for path in [folder, *folder.rglob("*")]:
            number = path.stat().st_ino
            if path.is_dir():
                (place / f"{number}.names").write_text(json.dumps(_numbers(path)))
            else:
                (place / f"{number}.content").write_bytes(path.read_bytes())

    def lose(self, share: Callable[[], float]) -> None:
        """Leave in the folder what a machine finds that lost its power: of what was not flushed, by `share`, none, some, or all.

        That of a file is as many of its first bytes, of a folder's names all or none.
        """
        there = {path.stat().st_ino: path for path in [self.folder, *self.folder.rglob("*")]}
        found = self.folder.with_name(f"{self.folder.name}-found")

        def make(number: int, target: Path) -> None:
            path, names, flushed = there.get(number), self.place / f"{number}.names", self.place / f"{number}.content"
            if names.exists() or (path is not None and path.is_dir()):
                was = json.loads(names.read_bytes()) if names.exists() else {}
                target.mkdir()
                for name, of_it in (was if path is None or share() < 1 else _numbers(path)).items():
                    make(of_it, target / name)
                return
            content = flushed.read_bytes() if flushed.exists() else b""
            written = content if path is None else path.read_bytes()
            part = 0.0 if written == content else share()
            target.write_bytes(written[: int(part * len(written))] if part else content)

        make(self.root, found)
        shutil.rmtree(self.folder)
        found.rename(self.folder)


def _numbers(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in folder.iterdir()}


def run_killed(
    forks: Forks,
    folder: Path,
    *words: object,
    kill: Kill = NEVER,
    snapshot_seconds: float = 0.0,
    disk: Disk | None = None,
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
        "DISK": "" if disk is None else str(disk.place),
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
