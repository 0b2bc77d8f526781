"""Compress a model within `model.memory`, and watch the process from outside.

`python benchmarks/memory.py MODEL OUTPUT --memory 4GiB` runs `armor-apply` in a process of its own with ARMOR of few iterations on
random tokens, reads its RssAnon from /proc every 20 ms, and prints the peak as a line of JSON. Exit code 1 where it was above the
memory that was allowed, or the run failed.
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
        process = subprocess.Popen(["armor-apply", str(file)], stdout=sys.stderr)
        peaks = watch(process)
    within = options.memory is None or peaks["RssAnon"] <= memory_bytes(options.memory)
    row = {
        "memory": options.memory,
        "exit_code": process.returncode,
        "seconds": round(time.monotonic() - started, 1),
        "peak_mib": {name: value >> 20 for name, value in peaks.items()},
        "within": within,
    }
    print(json.dumps(row))
    return int(process.returncode != 0 or not within)


def watch(process: subprocess.Popen[bytes]) -> dict[str, int]:
    """Most bytes of anonymous, of private writable and of file-backed memory until the process ends."""
    peaks = {"RssAnon": 0, "VmData": 0, "RssFile": 0, "RssShmem": 0}
    while process.poll() is None:
        try:
            lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        except (FileNotFoundError, ProcessLookupError):
            break
        for line in lines:
            name, _, value = line.partition(":")
            if name in peaks:
                peaks[name] = max(peaks[name], 1024 * int(value.split()[0]))
        time.sleep(_INTERVAL)
    process.wait()
    return peaks


if __name__ == "__main__":
    sys.exit(main())
