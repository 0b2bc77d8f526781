"""A skip for a reason that `skips.py` does not list fails the run, in tests, in fixtures and in whole modules."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import EXPECTED, MISSING, VARIABLE, expected

HERE = Path(__file__).parent


def run(folder: Path, source: str, without: str = "") -> tuple[int, str]:
    """Exit code and output of pytest on a module that holds this source, with the hooks and nothing else of the suite."""
    (folder / "pytest.ini").write_text("[pytest]\n")
    (folder / "test_it.py").write_text("import pytest\n" + source)
    environment = {**os.environ, "PYTHONPATH": str(HERE), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", VARIABLE: without}
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "skips", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


TEST = """
def test_that_runs():
    pass

@pytest.mark.skipif(True, reason="{0}")
def test_marked():
    pass

def test_that_says_so():
    pytest.skip("{0}")

@pytest.fixture
def machine():
    pytest.skip("{0}")

def test_of_a_fixture(machine):
    pass

@pytest.mark.xfail(strict=True)
def test_known_to_fail():
    assert False
"""
MODULE = """
pytest.skip("{0}", allow_module_level=True)
"""


@pytest.mark.parametrize(("source", "skips"), [(TEST, 3), (MODULE, 1)], ids=["tests", "module"])
def test_an_expected_skip_passes(source: str, skips: int, tmp_path: Path) -> None:
    code, out = run(tmp_path, source.format("no GPU"))
    assert (code, f"{skips} skipped" in out) == (0 if skips == 3 else 5, True), out


@pytest.mark.parametrize(("source", "skips"), [(TEST, 3), (MODULE, 1)], ids=["tests", "module"])
def test_any_other_skip_fails(source: str, skips: int, tmp_path: Path) -> None:
    code, out = run(tmp_path, source.format("no GPU today"))
    assert code, out
    assert "skipped, and tests/skips.py does not expect that: no GPU today" in out
    assert " skipped" not in out.splitlines()[-1]


def test_a_missing_compiler_is_expected_where_it_is_named(tmp_path: Path) -> None:
    source = TEST.format("the kernel was not built")
    assert run(tmp_path, source)[0] == 1
    assert run(tmp_path, source, "compiler,peft")[0] == 0
    code, out = run(tmp_path, source, "kompiler")
    assert code
    assert f"{VARIABLE} names ['kompiler']: it takes compiler, peft, pillow, triton, between commas" in out


def test_every_reason_in_the_suite_is_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ",".join(MISSING))
    assert expected("could not import 'peft': No module named 'peft'")
    assert not expected("could not import 'setuptools': No module named 'setuptools'")
    assert len(EXPECTED) == len(set(EXPECTED))
