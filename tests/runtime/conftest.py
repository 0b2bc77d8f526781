"""No test leaves choices of `auto` behind; a small checkpoint, and the backend that is the default outside of tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from armor_recipes.runtime import auto
from tests.support.packed import write


@pytest.fixture(autouse=True)
def _no_choices() -> Iterator[None]:
    auto.forget()
    yield
    auto.forget()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    write("llama-attention-bias-gqa", folder)
    return folder


@pytest.fixture
def default_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ARMOR_BACKEND")
