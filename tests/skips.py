"""A skip that nobody expects is a failure: a test that quietly stops running checks nothing.

`conftest.py` takes the two hooks from here. A reason that is in none of the lists below turns the skip into a failure.
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator

import pytest

EXPECTED = (
    r"no GPU(, and not TRITON_INTERPRET=1)?",
    r"there is a GPU",
    r"no fp8 on this GPU",
    r"the interpreter compiles nothing",
    r"this is the process in which the kernel runs",  # another process of the same run has the other tests
    r"models/[\w.-]+ was not fetched; the recipe itself is checked above",
    r"models/[\w.-]+ was not fetched: `make [\w-]+` does",
    r"set ARMOR_LEGACY_PYTHON to a Python with .*",
    r"this user may read everything",
    r"this user may mount nothing",
    r"torch runs on another OpenMP here, or none",
    r"no fork here",
    r"less than 10 GB of disk are free",
    r"peak memory is read from /proc",
    r"could not import 'lm_eval': .*",  # the extra `eval`, which brings much
    r"no chromium on the path",
    r"transformers before 5\.18 reads images with torchvision",
    r"compressed-tensors before 0\.1[89]",
    r"Triton before 3\.9 shuffles",
)
"""What a machine may lack, and what no environment of the Makefile brings."""

MISSING = {
    "compiler": (r"the (kernel|compiled sweep|extension) was not built", r"no C compiler"),
    "peft": (r"could not import 'peft': .*",),
    "pillow": (r"could not import 'PIL': .*",),
    "triton": (r"Triton is not installed",),
}
"""What the `dev` extra brings, and a C compiler: tests of these are skipped only where the variable below names them."""

VARIABLE = "ARMOR_TESTS_WITHOUT"


def expected(reason: str) -> bool:
    """Whether a test may be skipped for this reason. Raises `pytest.UsageError` where the variable names what is unknown."""
    without = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    unknown = [name for name in without if name not in MISSING]
    if unknown:
        raise pytest.UsageError(f"{VARIABLE} names {unknown}: it takes {', '.join(MISSING)}, between commas")
    allowed = (*EXPECTED, *(pattern for name in without for pattern in MISSING[name]))
    return any(re.fullmatch(pattern, reason, re.DOTALL) for pattern in allowed)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Of a test, or of its set-up."""
    report = yield
    _refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Of a module that skips itself."""
    report = yield
    _refuse(report)
    return report


def _refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.outcome != "skipped" or hasattr(report, "wasxfail"):
        return
    assert isinstance(report.longrepr, tuple)
    path, line, said = report.longrepr
    reason = said.removeprefix("Skipped: ")
    if not expected(reason):
        report.outcome = "failed"
        report.longrepr = f"{path}:{line}: skipped, and tests/skips.py does not expect that: {reason}"
