"""The Triton kernels compiled for cards that are not here: what a warp reads, and that no weight passes through shared memory."""

from __future__ import annotations

import os
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
from packaging.version import Version

from tests.benchmarks.test_rivals import benchmark

pytestmark = [
    pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]


@pytest.fixture
def gpu_compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return benchmark("gpu_compiled")


@pytest.mark.skipif(
    find_spec("triton") is not None and Version(version("triton")) < Version("3.9"), reason="Triton before 3.9 shuffles"
)
@pytest.mark.parametrize(("core", "vectors"), [("float", 9), ("int8", 5), ("int4", 4)])
def test_weights_come_16_bytes_at_a_time_and_stay_in_their_lane(
    gpu_compiled: ModuleType, core: str, vectors: int
) -> None:
    """A record is 16 · 256 weights: 9, 5 or 3 vectors of 16 bytes for each of 32 lanes; int4's scales are one more."""
    (contender,) = (found for found in gpu_compiled.contenders(90) if found.name == f"core {core}, 8 tokens")
    found = gpu_compiled.compile_kernel(contender, 90)
    of_x = 256 * 8 * 2 // (32 * 16)
    assert found.loads == vectors + of_x
    assert found.shuffles == 0
    assert found.shared_stores == of_x + 4  # and the sums, once
    assert found.spilled_bytes == 0


@pytest.mark.slow
def test_all_kernels_compile_for_all_cards(gpu_compiled: ModuleType) -> None:
    for capability in gpu_compiled.CAPABILITIES:
        for contender in gpu_compiled.contenders(capability):
            found = gpu_compiled.compile_kernel(contender, capability)
            assert found.registers <= 255, contender.name
            assert found.spilled_bytes <= 128, contender.name
            assert found.shared_bytes <= 99 << 10, contender.name  # what a program of 8.6 and 8.9 can have
