"""A shell in an empty working directory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import Shell


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Shell]:
    """Commands run in an empty working directory, with a wide screen; transformers' logging is put back afterwards."""
    from transformers.utils import logging

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    verbosity = logging.get_verbosity()
    yield Shell(monkeypatch, capsys)
    logging.set_verbosity(verbosity)
    logging.enable_progress_bar()
