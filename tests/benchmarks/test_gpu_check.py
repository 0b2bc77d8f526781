"""benchmarks/gpu_check.py without a card: what it says, and all of it in Triton's interpreter on tiny shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tests.support.pages import ROOT


def run(results: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py"), "--results", str(results), *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(results / "cache")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sees no GPU: nothing was checked" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_a_dry_run_goes_through_all_parts_and_goes_on_where_it_was_cut_short(tmp_path: Path) -> None:
    short = run(tmp_path, "--dry", "--only", "check", "solver", "--seconds", "1")
    assert short.returncode == 0, short.stderr
    assert "check: no time was left" in short.stdout
    done = run(tmp_path, "--dry", "--seconds", "800")
    assert done.returncode == 0, done.stdout + done.stderr
    folder = tmp_path / "dry-run"
    found = json.loads((folder / "results.json").read_text("utf-8"))
    assert found["card"] == "dry run"
    assert set(found["parts"].values()) == {"done"}
    assert list(found["parts"]) == ["check", "tune", "few", "many", "model", "solver"]
    times = found["rows"]["layer-64x512-1"]["times"]
    assert {"dense", "dense fp8", "2:4", "ARMOR bf16", "ARMOR int8", "ARMOR int4", "S alone"} <= set(times)
    assert set(times["ARMOR int4"]) == {"cold", "warm", "host"}
    again = run(tmp_path, "--dry")
    assert again.returncode == 0
    assert "…" not in again.stdout
    assert json.loads((folder / "results.json").read_text("utf-8"))["rows"] == found["rows"]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_what_is_wrong_is_not_timed(tmp_path: Path) -> None:
    (tmp_path / "dry-run" / "check-bf16-24x80.json").mkdir(parents=True)  # a row that cannot be read
    done = run(tmp_path, "--dry")
    assert done.returncode == 1
    assert "check: failed, 1" in done.stdout
    assert "tune" not in done.stdout
