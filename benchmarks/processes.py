"""How much sooner several processes end a run than one: each with one thread, and the same bytes.

    python benchmarks/processes.py recipes/smollm2-135m.yaml --work FOLDER [--processes 1,2] [--set KEY=VALUE …] [--json FILE]

A run is a folder, `FOLDER/1` or `FOLDER/2`, by `armor-apply` or by torchrun; what exists is not run again, so that a benchmark that
was cut short goes on. Times are of the run's own report: whole, and from the calibration's first pass to the last write without the
evaluations around it. Sizes of a budget are measured anew in each run. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from turns import keep

from armor_recipes.checkpoint.files import MANIFEST_FILE

#: Phases of a run between its evaluations.
WORK = ("measure", "compress", "save")


def run(processes: int, recipe: str, overrides: Sequence[str], folder: Path) -> None:
    """Apply the recipe by so many processes. Raises CalledProcessError where it fails."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [sys.executable, *launcher, "-m", "armor_recipes.cli", recipe, "--output", str(folder)]
    command += [word for override in overrides for word in ("--set", override)]
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": cache}
        subprocess.run(command, env=environment, stdout=sys.stderr, check=True)


def row(folder: Path) -> dict[str, Any]:
    """What a run's report says of its time, and the hash of its manifest. Raises ValueError where it had more threads than one."""
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    if report["threads"] != 1:
        raise ValueError(f"{folder} was run by {report['threads']} threads a process")
    phases = report["seconds_by_phase"]
    return {
        "processes": report["processes"],
        "seconds": round(report["seconds"], 1),
        "work_seconds": round(sum(phases.get(name, 0.0) for name in WORK), 1),
        "evaluation_seconds": round(sum(value for name, value in phases.items() if name.startswith("evaluate")), 1),
        "peak_mib": report["peak_anonymous_memory_bytes"] >> 20,
        "manifest_sha256": hashlib.sha256((folder / MANIFEST_FILE).read_bytes()).hexdigest(),
    }


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with how many times as fast as the first each is. Raises ValueError where manifests differ, and so bytes."""
    first = rows[0]
    for one in rows:
        if one["manifest_sha256"] != first["manifest_sha256"]:
            raise ValueError(f"{one['processes']} processes wrote other bytes than {first['processes']}")
    return [
        {**one, **{f"times_{what}": round(first[what] / one[what], 3) for what in ("seconds", "work_seconds")}}
        for one in rows
    ]


def main() -> None:
    """Run what is missing, then print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="a file, or the name of one that comes with the package")
    parser.add_argument("--work", type=Path, required=True, help="where outputs are kept")
    parser.add_argument("--processes", default="1,2", help="how many, the first to be compared with")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as of `armor-apply`")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    options = parser.parse_args()
    folders = {int(count): options.work / count for count in options.processes.split(",")}
    options.work.mkdir(parents=True, exist_ok=True)
    for count, folder in folders.items():
        if not (folder / "report.json").exists():
            run(count, options.recipe, options.set, folder)
    rows = compared([row(folder) for folder in folders.values()])
    for one in rows:
        print(json.dumps(one))
    if options.json:
        keep(options.json, {"rows": rows})


if __name__ == "__main__":
    main()
