"""What all tests share: small tensors run fastest on one thread, and nothing may ask a hub."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

# Read when torch is loaded. A thread that waits for others does so asleep: it would take the processor from those that work.
os.environ["OMP_WAIT_POLICY"] = "passive"

import pytest
import torch
from hypothesis import settings

from tests.skips import pytest_make_collect_report, pytest_runtest_makereport  # noqa: F401 - hooks
from tests.support.forks import Forks

os.environ["HF_HUB_OFFLINE"] = "1"
# Many tests compare bits of loaded models; `auto`, the default, is tested in tests/runtime.
os.environ["ARMOR_BACKEND"] = "folded"
# The same examples in every run; HYPOTHESIS_PROFILE=explore draws new ones.
settings.register_profile("same", derandomize=True, deadline=None)  # a busy machine is no fault
settings.register_profile("explore", derandomize=False, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))
os.environ["TOKENIZERS_PARALLELISM"] = "false"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a stock Llama, one for all tests of a process, which leave it as it is."""
    from tests.support.engine import save_model  # what imports a hub's client, after HF_HUB_OFFLINE is set

    return save_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="session")
def forks() -> Iterator[Forks]:
    """Runs scripts in processes of their own, which find torch and transformers imported."""
    with Forks() as started:
        yield started


@pytest.fixture
def in_interpreter() -> Callable[..., None]:
    """Run test modules in Triton's interpreter, in a process of its own: TRITON_INTERPRET counts when Triton is imported."""

    def run(*arguments: Path | str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)]
        environment = {**os.environ, "TRITON_INTERPRET": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "skipped" not in done.stdout

    return run
