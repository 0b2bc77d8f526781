"""No test leaves choices of `auto` behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from armor_recipes.runtime import auto


@pytest.fixture(autouse=True)
def _no_choices() -> Iterator[None]:
    auto.forget()
    yield
    auto.forget()
