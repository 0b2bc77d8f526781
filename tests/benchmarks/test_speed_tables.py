"""benchmarks/runtime.py and kernel.py: what their tables say of what was measured."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks.test_rivals import benchmark


def side(folder: str, seconds: float, megabytes: int) -> dict[str, Any]:
    """What one process measured, in three turns of which the second was slowed to half."""
    turns = [seconds, 2 * seconds, seconds]
    return {
        "folder": folder,
        "backend": "auto",
        "seconds": {"decode": turns, "prefill": turns},
        "peak_bytes": {"anonymous": megabytes * 10**6, "resident": megabytes * 10**6},
        "disk_bytes": megabytes * 10**6,
    }


def test_speed_is_compared_within_turns() -> None:
    row = {
        "own": side("packed", 0.5, 60),
        "dense": side("dense", 1.0, 80),
        "choices": {},
        "cpu_load_peak_bytes": {"resident": 90 * 10**6},
    }
    (found,) = benchmark("runtime").speed_rows({"int8 core": row})
    assert found["decode tok/s"] == 64 / 0.5
    assert found["decode of dense"] == {"value": 2.0, "interval": [2.0, 2.0]}  # a slow turn slows both
    assert (found["disk MB"], found["resident of dense"], found["cpu load"]) == (60, 0.75, "1.50")
    assert found["runs"] == "auto: folded"
    (dense,) = benchmark("runtime").speed_rows({"dense by our kernels": {**row, "own": side("dense", 0.5, 80)}})
    assert dense["runs"] == "auto"


def test_a_ratio_of_kernels_is_the_median_of_shapes_between_the_least_and_the_most() -> None:
    kernel = benchmark("kernel")
    rows = [
        kernel.Row(4096, 4096, tokens, "int8", 2.0, 1.0, 0.5, ratio, ratio / 2)
        for tokens in (1, 8)
        for ratio in (4.0, 1.0, 2.0)
    ]
    found = kernel.summaries(rows)
    assert [one["tokens"] for one in found] == [1, 8]
    assert found[0]["torch / ours"] == {"value": 2.0, "interval": [1.0, 4.0]}
    assert found[0]["dense / ours"]["value"] == pytest.approx(1.0)
