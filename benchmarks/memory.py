"""Compress a model within `model.memory`, and watch the process from outside.

`python benchmarks/memory.py MODEL OUTPUT --memory 4GiB [--processes 2]` runs `armor-apply` in a process of its own, or several by
torchrun, with ARMOR of few iterations on random tokens. It reads their RssAnon from /proc every 20 ms and prints as a line of JSON
the peak of the one that had most, and that of their sum, beside what the run's own report says of plan and outcome. Exit code 1
where one was above the memory that was allowed, or the run failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from armor_recipes.recipe.schema import memory_bytes

_INTERVAL = 0.02


def main() -> int:
    """Run and measure; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("output")
    parser.add_argument("--memory", help="left out: no bound, and all in memory")
    parser.add_argument("--processes", type=int, default=1, help="with `memory` for each")
    parser.add_argument("--iterations", type=int, default=1)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--compute", default="auto", help="model.compute_dtype")
    options = parser.parse_args()
    calibration = {
        "dataset": "builtin:random-tokens",
        "samples": options.samples,
        "sequence_length": options.length,
        "batch_size": 2,
    }
    model = {"id": options.model, "compute_dtype": options.compute}
    recipe = {
        "model": model | ({"memory": options.memory} if options.memory else {}),
        "calibration": calibration,
        "prune_stage": {
            "armor_modifiers": {
                "ARMORModifier": {"targets": ["Linear"], "ignore": ["lm_head"], "iterations": options.iterations}
            }
        },
        "output": {"path": options.output},
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "recipe.yaml"
        file.write_text(json.dumps(recipe))
        started = time.monotonic()
        launcher = ["torchrun", "--nproc-per-node", str(options.processes), "-m", "armor_recipes.cli"]
        command = ["armor-apply"] if options.processes == 1 else launcher
        process = subprocess.Popen([*command, str(file)], stdout=sys.stderr)
        peaks, together = watch(process)
    within = options.memory is None or peaks["RssAnon"] <= memory_bytes(options.memory)
    row = {
        "memory": options.memory,
        "processes": options.processes,
        "exit_code": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "peak_mib": {name: value >> 20 for name, value in peaks.items()},
        "together_mib": together >> 20,
        "within": within,
        **(planned(Path(options.output)) if process.returncode == 0 else {}),
    }
    print(json.dumps(row))
    return int(process.returncode != 0 or not within)


def planned(output: Path) -> dict[str, int | float]:
    """What the report of a run says that it took, and what its plan thought; memory in MiB, without what files stand behind."""
    report = json.loads((output / "report.json").read_text(encoding="utf-8"))
    return {
        "planned_mib": report["peak_memory_estimated_bytes"] >> 20,
        "cpu_seconds": round(report["cpu_seconds"]),
        "planned_cpu_seconds": round(report["cpu_seconds_estimated"]),
    }


def watch(process: subprocess.Popen[bytes]) -> tuple[dict[str, int], int]:
    """Most bytes of anonymous, of private writable and of file-backed memory that one process has, and of anonymous of all."""
    peaks, together = {"RssAnon": 0, "VmData": 0, "RssFile": 0, "RssShmem": 0}, 0
    while process.poll() is None:
        found = [memory_of(pid) for pid in family(process.pid)]
        for name in peaks:
            peaks[name] = max(peaks[name], *(memory.get(name, 0) for memory in found), 0)
        together = max(together, sum(memory.get("RssAnon", 0) for memory in found))
        time.sleep(_INTERVAL)
    process.wait()
    return peaks, together


def family(pid: int) -> list[int]:
    """The process and what it started; nothing of one that has ended."""
    try:
        children = [
            int(child)
            for task in Path(f"/proc/{pid}/task").iterdir()
            for child in (task / "children").read_text().split()
        ]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return [pid, *(found for child in children for found in family(child))]


def memory_of(pid: int) -> dict[str, int]:
    """Bytes by the names of /proc/PID/status; empty where the process has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    parts = (line.split() for line in lines)
    return {name.rstrip(":"): 1024 * int(value[0]) for name, *value in parts if value[-1:] == ["kB"]}


if __name__ == "__main__":
    sys.exit(main())
