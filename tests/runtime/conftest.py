"""Puts tests/checkpoint on the import path, for `packed_samples`; and no test leaves choices of `auto` behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from armor_recipes.runtime import auto

sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))


@pytest.fixture(autouse=True)
def _no_choices() -> Iterator[None]:
    auto.forget()
    yield
    auto.forget()
