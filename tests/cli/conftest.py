"""Puts tests/session and this folder on the import path; a shell, and one stock model for all tests here."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "session")]

from engine_samples import save_model  # noqa: E402 - found on the path that was just extended

if TYPE_CHECKING:
    from commands import Shell


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Shell]:
    """Commands run in an empty working directory, with a wide screen; transformers' logging is put back afterwards."""
    from commands import Shell
    from transformers.utils import logging

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    verbosity = logging.get_verbosity()
    yield Shell(monkeypatch, capsys)
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
