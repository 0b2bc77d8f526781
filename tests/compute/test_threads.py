"""Pieces of work side by side: one thread each, in order, however many there are."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from armor_recipes.compute.threads import at_once, in_order, one_thread, side_by_side


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_torch_has_one_thread_and_as_many_pieces_are_computed_as_it_had_before() -> None:
    assert at_once() == 3
    with side_by_side():
        assert (torch.get_num_threads(), at_once()) == (1, 3)
        with one_thread():
            assert at_once() == 1
        with side_by_side():
            assert at_once() == 3
        assert list(in_order(lambda _: (torch.get_num_threads(), at_once()), range(4), on_cpu=True)) == [(1, 1)] * 4
    assert (torch.get_num_threads(), at_once()) == (3, 3)


def test_results_come_in_order_from_several_threads_with_gradients_as_here() -> None:
    def work(item: int) -> tuple[int, bool, int]:
        time.sleep(0.02 * (4 - item))
        return item, torch.is_grad_enabled(), threading.get_ident()

    with torch.no_grad():
        found = list(in_order(work, range(5), on_cpu=True))
    assert [one[:2] for one in found] == [(item, False) for item in range(5)]
    assert len({one[2] for one in found}) == 3
    assert next(in_order(work, [4], on_cpu=False)) == (4, True, threading.get_ident())


def test_the_first_error_in_order_is_raised() -> None:
    def work(item: int) -> int:
        if item:
            raise ValueError(str(item))
        time.sleep(0.05)
        return item

    results = in_order(work, range(3), on_cpu=True)
    assert next(results) == 0
    with pytest.raises(ValueError, match="1"):
        next(results)
