"""Several solves of a block at once: the dearest begin first, results come in the order of the plan."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch

from armor_recipes.modifiers.kinds.pool import in_order


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("costs", "first"), [((1.0, 5.0, 3.0), {1, 2}), ((2.0, 2.0, 2.0), {0, 1}), ((), {0, 1})])
def test_the_dearest_begin_first(costs: tuple[float, ...], first: set[int]) -> None:
    meeting, begun = threading.Barrier(2, timeout=20), []

    def job(place: int, _: Any) -> int:
        begun.append(place)
        if place in first:
            meeting.wait()  # breaks unless both are under way
        return place

    found = in_order([partial(job, place) for place in range(3)], torch.device("cpu"), costs)
    assert list(found) == [0, 1, 2]
    assert set(begun[:2]) == first
