"""Passes at once: results in their order and not too many of them, the first error in order, and nothing after an interrupt."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armor_recipes.modifiers import RefineTask, UnitOutput
from armor_recipes.modifiers.passes import Passes, passes_of
from armor_recipes.modifiers.threads import one_thread_each, results_in_order

SOON = 20.0  # seconds that a test waits for what comes at once, before it fails


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


# --- the pool ----------------------------------------------------------------------------------------------------------------


def test_results_come_in_order_whoever_is_done_first() -> None:
    later = threading.Event()

    def work(item: int) -> int:
        if item == 0:
            assert later.wait(SOON)
        if item == 2:
            later.set()
        return item * item

    with ThreadPoolExecutor(2) as pool:
        assert list(results_in_order(pool, work, range(6), at_once=3)) == [0, 1, 4, 9, 16, 25]


def test_no_more_results_wait_than_are_asked_for() -> None:
    begun: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        results = results_in_order(pool, lambda item: begun.append(item) or item, range(50), at_once=3)
        for taken in range(10):
            assert next(results) == taken
            assert max(begun) <= taken + 3
        results.close()  # type: ignore[attr-defined]
    assert max(begun) <= 13


def test_the_first_error_in_order_is_raised_and_nothing_begins_after_it() -> None:
    both = threading.Barrier(2)
    begun: list[int] = []

    def work(item: int) -> None:
        begun.append(item)
        both.wait(SOON)  # the second fails first
        if item == 0:
            assert failed.wait(SOON)
        try:
            raise ValueError(str(item))
        finally:
            failed.set()

    failed = threading.Event()
    with pytest.raises(ValueError, match=r"^0$"), ThreadPoolExecutor(2) as pool:
        list(results_in_order(pool, work, range(9), at_once=2))
    assert sorted(begun) == [0, 1]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_has_not_begun_when_a_pool_is_left_never_does(error: type[BaseException]) -> None:
    begun: list[int] = []
    go, first = threading.Event(), threading.Event()

    def work(item: int) -> None:
        begun.append(item)
        first.set()
        assert go.wait(SOON)

    def interrupted(pool: Any) -> None:
        for item in range(5):
            pool.submit(work, item)
        assert first.wait(SOON)
        threading.Timer(0.05, go.set).start()
        raise error

    with pytest.raises(error), one_thread_each(1) as pool:
        interrupted(pool)
    assert begun == [0]
    assert torch.get_num_threads() == 3


# --- a training's passes -------------------------------------------------------------------------------------------------------


def squared(found: UnitOutput, wanted: UnitOutput) -> Tensor:
    return (found.output - wanted.output).square().mean()


class Line:
    """y = p · x against y = 3 · x, on batches `(B, L, 1)`; counts what is asked of it."""

    def __init__(self, batches: int = 4) -> None:
        generator = torch.Generator().manual_seed(2)
        self.inputs = [torch.randn(3, 5, 1, generator=generator) for _ in range(batches)]
        self.slope = nn.Parameter(torch.ones(1))
        self.asked: list[int] = []
        self.task = RefineTask({}, {}, batches, self.forward, lambda batch: UnitOutput(3 * self.inputs[batch]))

    def forward(self, batch: int) -> UnitOutput:
        self.asked.append(batch)
        return UnitOutput(self.slope * self.inputs[batch])

    def passes(self) -> Any:
        return passes_of(self.task, [self.slope], squared)


def test_gradients_and_losses_are_those_of_each_batch_in_order() -> None:
    line = Line()
    with line.passes() as passes:
        gradients = list(passes.gradients([2, 0, 3]))
        losses = passes.losses([1, 2])
    for batch, found in zip([2, 0, 3], gradients, strict=True):
        wanted = -4 * line.inputs[batch].square().mean()
        torch.testing.assert_close(found.parts[0], wanted.view(1))
        assert found.length == pytest.approx(-float(wanted))
    assert losses == pytest.approx([4 * float(line.inputs[batch].square().mean()) for batch in (1, 2)])


def test_a_cpu_has_as_many_workers_as_torch_has_threads() -> None:
    with Line().passes() as passes:
        assert passes.workers == 3
        seen = list(passes.pool.map(lambda _: torch.get_num_threads(), range(6)))
    assert seen == [1] * 6
    assert torch.get_num_threads() == 3


def test_an_interrupt_ends_passes_under_way_before_their_next_half() -> None:
    line, results = Line(), []
    begun, stopped = threading.Event(), threading.Event()

    def target(batch: int) -> UnitOutput:
        begun.set()
        assert stopped.wait(SOON)
        return UnitOutput(line.inputs[batch])

    def interrupted(passes: Passes) -> None:
        results.append(passes.pool.submit(passes.losses, [0]))
        assert begun.wait(SOON)
        threading.Timer(0.05, stopped.set).start()
        raise KeyboardInterrupt

    line.task = replace(line.task, target=target)
    with pytest.raises(KeyboardInterrupt), line.passes() as passes:
        interrupted(passes)
    assert isinstance(results[0].exception(), CancelledError)
    assert line.asked == []
