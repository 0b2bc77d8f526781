"""A stream of 5 GB takes the memory of one of 5 MB, and seconds, as `benchmarks/streams.py` measures them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from tests.benchmarks.test_rivals import benchmark


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".txt"])
def test_five_gigabytes_take_the_memory_of_five_megabytes_and_seconds(tmp_path: Path, suffix: str) -> None:
    streams = benchmark("streams")
    if shutil.disk_usage(tmp_path).free < 2 * streams.LARGE:
        pytest.skip("less than 10 GB of disk are free")
    found = streams.row(tmp_path, suffix, (512, 2048))
    assert list(tmp_path.iterdir()) == []
    for length in (512, 2048):
        assert found[f"{length} of 5 GB, MB"] - found[f"{length} of 5 MB, MB"] < 50
        assert found[f"{length} of 5 GB, s"] < 60
