"""Times, memory and sizes of a run: everything that differs between two equal runs."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from armor_recipes.events import Observer, PhaseStarted
from armor_recipes.modifiers.kinds.changes import ModuleResult
from armor_recipes.plan import RunEstimate


class Stopwatch:
    """Announces phases to the observer and adds up their seconds."""

    def __init__(self, observer: Observer) -> None:
        self.observer = observer
        self.started = datetime.now(UTC)
        self._begin = time.perf_counter()
        self._mark = self._begin
        self._name: str | None = None
        self.seconds: dict[str, float] = {}

    def phase(self, name: str) -> None:
        """End the phase that runs and begin another."""
        self._close()
        self._name = name
        self.observer(PhaseStarted(name))

    def _close(self) -> None:
        now = time.perf_counter()
        if self._name is not None:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._mark
        self._mark = now

    def report(
        self, folder: Path, *, source: Path | None, estimate: RunEstimate, modules: Mapping[str, ModuleResult]
    ) -> dict[str, Any]:
        """Plain data for `report.json`; sizes are bytes of the weight files."""
        self._close()
        return {
            "started": self.started.isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - self._begin, 3),
            "seconds_by_phase": {name: round(value, 3) for name, value in self.seconds.items()},
            "seconds_by_module": {
                name: round(result.seconds + sum(change.seconds for change in result.changes), 3)
                for name, result in modules.items()
            },
            "seconds_estimated": estimate.seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "peak_memory_estimated_bytes": estimate.peak_bytes,
            "size_before_bytes": None if source is None else weight_bytes(source),
            "size_after_bytes": weight_bytes(folder),
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "platform": platform.platform(),
        }


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's weight files."""
    return sum(path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))


def peak_memory_bytes() -> int:
    """The process's largest resident set so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
