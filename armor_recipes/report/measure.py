"""Times, memory and sizes of a run: everything that differs between two equal runs."""

from __future__ import annotations

import platform
import resource
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from armor_recipes.compute import give_back
from armor_recipes.compute.memory import process_bytes
from armor_recipes.compute.ranks import ranks
from armor_recipes.events import Observer, PhaseStarted
from armor_recipes.modifiers.kinds.changes import ModuleResult
from armor_recipes.plan import RunEstimate

#: Seconds from one look at the memory to the next.
_INTERVAL = 0.05


@dataclass(frozen=True, slots=True)
class _Now:
    """A moment: on the clock, and in CPU seconds of this process with all its threads."""

    wall: float
    cpu: float

    @classmethod
    def read(cls) -> _Now:
        return cls(time.perf_counter(), time.process_time())


class AnonymousPeak:
    """The most memory that no file stands behind, while it is entered; 0 where the system does not say it (but Linux).

    There is no record of it: it is looked at twenty times a second.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="memory", daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.is_set():
            self.bytes = max(self.bytes, process_bytes("RssAnon"))
            self._ended.wait(_INTERVAL)


class Stopwatch:
    """Announces phases to the observer and adds up their seconds, on the clock and of CPU time, with the peak of memory so far."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.started = datetime.now(UTC)
        self._begin = self._mark = _Now.read()
        self._name: str | None = None
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self.peaks: dict[str, int] = {}
        self._others = 0.0
        """CPU seconds of other processes, which `cpu_seconds` counts already."""
        self.anonymous = AnonymousPeak()

    def phase(self, name: str) -> None:
        """End the phase that runs and begin another, with the memory given back that the one before has freed."""
        self._close()
        give_back()
        self._name = name
        self.observer(PhaseStarted(name))

    def together(self) -> None:
        """Count the other processes' CPU seconds of the phases until now, too; all of them call it at the same place."""
        self._close()
        for other in ranks().gather(dict(self.cpu_seconds))[1:]:
            for name, seconds in other.items():
                self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + seconds
                self._others += seconds

    def _close(self) -> None:
        now, name = _Now.read(), self._name
        if name is not None:
            self.seconds[name] = self.seconds.get(name, 0.0) + now.wall - self._mark.wall
            self.cpu_seconds[name] = self.cpu_seconds.get(name, 0.0) + now.cpu - self._mark.cpu
            self.peaks[name] = peak_memory_bytes()
        self._mark = now

    def report(
        self, folder: Path, *, source: Path | None, estimate: RunEstimate, modules: Mapping[str, ModuleResult]
    ) -> dict[str, Any]:
        """Plain data for `report.json`; sizes are bytes of the weight files."""
        self._close()
        return {
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(self._mark.wall - self._begin.wall, 3),
            "seconds_by_phase": {name: round(value, 3) for name, value in self.seconds.items()},
            "cpu_seconds": round(self._mark.cpu - self._begin.cpu + self._others, 3),
            "cpu_seconds_by_phase": {name: round(value, 3) for name, value in self.cpu_seconds.items()},
            "seconds_by_module": {
                name: round(result.seconds + sum(change.seconds for change in result.changes), 3)
                for name, result in modules.items()
            },
            "seconds_estimated": estimate.seconds,
            "cpu_seconds_estimated": estimate.cpu_seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_memory_bytes_by_phase": dict(self.peaks),
            "peak_anonymous_memory_bytes": self.anonymous.bytes,
            "peak_memory_estimated_bytes": estimate.peak_bytes,
            "size_before_bytes": None if source is None else weight_bytes(source),
            "size_after_bytes": weight_bytes(folder),
            "threads": torch.get_num_threads(),
            "processes": ranks().size,
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "platform": platform.platform(),
        }


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files."""
    return sum(path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))


def peak_memory_bytes() -> int:
    """The process's largest resident set so far."""
    peak = process_bytes("VmHWM")  # on Linux getrusage counts what a process was before it started this program
    if peak:
        return peak
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
