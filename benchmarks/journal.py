"""What the journal costs a run: a recipe with and without it, in turns, each run in a process of its own.

    python benchmarks/journal.py recipes/smollm2-135m.yaml --work FOLDER [--turns 5] [--set KEY=VALUE …]

A run is one JSON file, `FOLDER/turnN/with.json` or `without.json`; what exists is not run again. Every other turn begins with the
run without. The ratio is that of seconds within a turn, from report.json, as the median with a 95 % interval of resampled turns;
beside it stands that of CPU seconds. The last lines tell what of a run was spent in the functions that write and read the journal,
each counted by itself, and what they wrote. Sizes of a budget are measured anew in each run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

from turns import interval, keep

from armor_recipes.checkpoint.journal import JournalFiles
from armor_recipes.run import job as jobs
from armor_recipes.session.journal import Journal

ROWS = ("with", "without")
#: What all of a journal's reading and writing goes through; none of these calls another.
COUNTED = ("__init__", "append", "write", "took", "is_whole", "trim", "remove")


@contextmanager
def no_journal(*_: object, **__: object) -> Iterator[Journal]:
    """In the place of a run's own: it remembers nothing."""
    yield Journal()


def counted(spent: dict[str, float]) -> None:
    """Let the functions of journals add up their seconds and CPU seconds, and the bytes that they write."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def timed(self: JournalFiles, *args: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            found = function(self, *args)
            spent["seconds"] += time.perf_counter() - wall
            spent["cpu_seconds"] += time.process_time() - cpu
            if function.__name__ == "write":
                spent["bytes"] += (self.folder / found["file"]).stat().st_size
            spent["records"] += function.__name__ == "append"
            return found

        return timed

    for name in COUNTED:
        setattr(JournalFiles, name, wrap(getattr(JournalFiles, name)))


def run(row: str, recipe: str, overrides: Sequence[str], file: Path) -> None:
    """Apply the recipe in this process, which is made for that, and write what its report says."""
    spent = {"seconds": 0.0, "cpu_seconds": 0.0, "bytes": 0, "records": 0}
    if row == "with":
        counted(spent)
    else:
        setattr(jobs, "journaled", no_journal)  # noqa: B010 - it is no part of the module's own names
    with tempfile.TemporaryDirectory(dir=file.parent) as scratch:
        os.environ["XDG_CACHE_HOME"] = str(Path(scratch) / "cache")
        report = jobs.apply(recipe, overrides=overrides, output=Path(scratch) / "out").report
    names = ("seconds", "cpu_seconds", "seconds_by_phase", "peak_anonymous_memory_bytes", "threads")
    keep(file, {**{name: report[name] for name in names}, "journal": spent, "load_average": os.getloadavg()[0]})


def run_apart(row: str, recipe: str, overrides: Sequence[str], file: Path) -> None:
    """`run` in a process of its own. Raises RuntimeError where it fails."""
    file.parent.mkdir(parents=True, exist_ok=True)
    options = [word for override in overrides for word in ("--set", override)]
    command = [sys.executable, __file__, recipe, "--work", str(file), "--row", row, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the run {row} a journal failed ({done.returncode}): {done.stderr.strip()}")


def report(turns: Sequence[Mapping[str, Mapping[str, Any]]]) -> str:
    """Ratios and shares in words; `turns` hold a record `with` and one `without`."""
    lines = []
    for what in ("seconds", "cpu_seconds"):
        ratios = [turn["with"][what] / turn["without"][what] for turn in turns]
        low, high = interval(ratios)
        each = ", ".join(f"{statistics.median(turn[row][what] for turn in turns):.1f} {row}" for row in ROWS)
        lines.append(f"{what.replace('_', ' ')}: {each}; ratio {statistics.median(ratios):.4f} [{low:.4f}, {high:.4f}]")
    own = [turn["with"] for turn in turns]
    for what in ("seconds", "cpu_seconds"):
        shares = [one["journal"][what] / one[what] for one in own]
        lines.append(f"in the journal's functions: {statistics.median(shares):.2%} of {what.replace('_', ' ')}")
    last = own[-1]["journal"]
    lines.append(f"{last['records']} records, {last['bytes'] / 1e6:.1f} MB written")
    loads = ", ".join(f"{one['load_average']:.1f}" for one in own)
    lines.append(f"{len(turns)} turns; load average {loads}")
    return "\n".join(lines)


def main() -> None:
    """Run the turns that are missing, then print what all of them say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a file, or the name of one that comes with the package")
    parser.add_argument("--work", type=Path, required=True, help="where records are kept, and outputs lie meanwhile")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `armor-apply`")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        run(options.row, options.recipe, options.set, options.work)
        return
    found = []
    for number in range(options.turns):
        files = {row: options.work / f"turn{number}" / f"{row}.json" for row in ROWS}
        for row in ROWS if number % 2 == 0 else reversed(ROWS):
            if not files[row].exists():
                print(f"turn {number}, {row} a journal …", flush=True)
                run_apart(row, options.recipe, options.set, files[row])
        found.append({row: json.loads(file.read_text(encoding="utf-8")) for row, file in files.items()})
    print(report(found))


if __name__ == "__main__":
    main()
