"""The peak of memory that is told is the process's own."""

from __future__ import annotations

import subprocess
import sys

from tests.support.commands import surroundings

CHILD = "from armor_recipes.report.measure import peak_memory_bytes; print(peak_memory_bytes())"
PARENT = f"""
import subprocess, sys
held = bytearray(900_000_000)
held[::4096] = b"x" * len(held[::4096])
subprocess.run([sys.executable, "-c", {CHILD!r}], check=True)
"""


def test_a_larger_process_that_started_it_is_not_counted() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT], env=surroundings(), capture_output=True, text=True, check=True
    )
    assert 10_000_000 < int(done.stdout) < 800_000_000
