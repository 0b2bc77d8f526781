"""Passes at once: results in their order and not too many of them, the first error in order, and nothing after an interrupt."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from armor_recipes.compute.threads import one_thread_each, results_in_order
from armor_recipes.errors import NumericalError
from armor_recipes.modifiers import RefineTask, UnitOutput
from armor_recipes.modifiers.passes import Passes, passes_of

ALL = slice(None)
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


class Squared:
    """The squared error of a slope's line relative to the target's square, as a ratio of sums over the batch."""

    def loss(self, found: UnitOutput, wanted: UnitOutput) -> Tensor:
        return (found.output - wanted.output).square().sum() / wanted.output.square().sum()

    def weight(self, wanted: UnitOutput) -> float:
        return float(wanted.output.square().sum())


class Line:
    """y = p · x against y = 3 · x and noise, on batches `(5, 7, 1)` of windows of very different size."""

    def __init__(self, parts: Sequence[slice] = (), batches: int = 4) -> None:
        generator = torch.Generator().manual_seed(2)
        sizes = torch.tensor([1.0, 30.0, 0.01, 3.0, 5.0]).view(5, 1, 1)
        self.inputs = [sizes * torch.randn(5, 7, 1, generator=generator) for _ in range(batches)]
        self.noise = [sizes * torch.randn(5, 7, 1, generator=generator) for _ in range(batches)]
        self.slope = nn.Parameter(torch.ones(1))
        self.asked: list[int] = []
        self.task = RefineTask({}, {}, batches, self.forward, self.target, [parts] * batches if parts else ())

    def forward(self, batch: int, windows: slice = ALL) -> UnitOutput:
        self.asked.append(batch)
        return UnitOutput(self.slope * self.inputs[batch][windows])

    def target(self, batch: int, windows: slice = ALL) -> UnitOutput:
        return UnitOutput((3 * self.inputs[batch] + self.noise[batch])[windows])

    def whole(self, batch: int) -> tuple[Tensor, Tensor]:
        """Loss and gradient of the batch."""
        loss = Squared().loss(self.forward(batch), self.target(batch))
        return loss.detach(), torch.autograd.grad(loss, self.slope)[0]

    def passes(self) -> Any:
        return passes_of(self.task, [self.slope], Squared())


APART = [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 5)]


@pytest.mark.parametrize("parts", [[], [ALL], APART], ids=["whole", "one part", "apart"])
def test_gradients_and_losses_are_those_of_each_batch_in_order(parts: list[slice]) -> None:
    line = Line(parts)
    with line.passes() as passes:
        gradients = list(passes.gradients([2, 0, 3]))
        losses = passes.losses([1, 2])
    for batch, found in zip([2, 0, 3], gradients, strict=True):
        wanted = line.whole(batch)[1]
        torch.testing.assert_close(found.scale * found.parts[0], wanted)
        assert found.length == pytest.approx(float(wanted.abs()), rel=1e-5)
    assert losses == pytest.approx([float(line.whole(batch)[0]) for batch in (1, 2)], rel=1e-5)


def test_a_batch_in_one_part_is_not_rounded_once_more() -> None:
    line = Line()
    with line.passes() as passes:
        (found,) = passes.gradients([1])
        losses = passes.losses([1])
    loss, gradient = line.whole(1)
    assert torch.equal(found.parts[0], gradient)
    assert (found.scale, losses) == (1.0, [float(loss)])


def test_windows_of_no_weight_are_left_out() -> None:
    line = Line(APART)
    line.inputs[1][:2] = 0
    line.noise[1][:2] = 0  # each 0 / 0 by itself
    with line.passes() as passes:
        (found,) = passes.gradients([1])
        losses = passes.losses([1])
    loss, gradient = line.whole(1)
    torch.testing.assert_close(found.scale * found.parts[0], gradient)
    assert losses == pytest.approx([float(loss)], rel=1e-5)


@pytest.mark.parametrize("parts", [[], APART], ids=["whole", "apart"])
def test_a_batch_without_any_weight_has_no_loss(parts: list[slice]) -> None:
    line = Line(parts)
    line.inputs[1].zero_()
    line.noise[1].zero_()
    with line.passes() as passes:
        with pytest.raises(NumericalError, match="a training loss is nan"):
            list(passes.gradients([0, 1]))
        with pytest.raises(NumericalError, match="a training loss is nan"):
            passes.losses([0, 1])


def test_the_length_of_a_long_gradient_does_not_depend_on_the_number_of_threads() -> None:
    """Of one part and of several. Torch's norm happens to take one thread, where its sums take several; nothing promises that."""
    weights = (3 * torch.randn(300_001, generator=torch.Generator().manual_seed(1))).exp()
    vector = nn.Parameter(torch.zeros(300_001))

    class Weighted(Squared):
        def loss(self, found: UnitOutput, wanted: UnitOutput) -> Tensor:
            return (vector * weights).sum() * found.output.sum()

    for parts in ((), APART):
        lengths = set()
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            with passes_of(Line(parts).task, [vector], Weighted()) as passes:
                lengths |= {found.length for found in passes.gradients([0, 1])}
        assert len(lengths) == 2


def test_gradients_that_are_one_tensor_are_summed_apart() -> None:
    """Autograd gives both terms of a sum the very same tensor."""
    one, two = (nn.Parameter(torch.zeros(5)) for _ in range(2))

    class Sum(Squared):
        def loss(self, found: UnitOutput, wanted: UnitOutput) -> Tensor:
            return ((one + two) * found.output.sum()).sum()

        def weight(self, wanted: UnitOutput) -> float:
            return 1.0

    line = Line([slice(i, i + 1) for i in range(5)])
    with passes_of(line.task, [one, two], Sum()) as passes:
        (found,) = passes.gradients([0])
    wanted = (line.inputs[0].sum() / 5).expand(5)
    for part in found.parts:
        torch.testing.assert_close(found.scale * part, wanted)


def test_the_first_error_in_order_is_raised_whichever_comes_first() -> None:
    line = Line(APART)
    late = threading.Event()

    def forward(batch: int, windows: slice = ALL) -> UnitOutput:
        if (batch, windows.start) == (0, 1):
            assert late.wait(SOON)
        if batch == 0 and windows.start in (1, 2):
            late.set()
            raise NumericalError(f"window {windows.start}")
        return line.forward(batch, windows)

    line.task = replace(line.task, forward=forward)
    with pytest.raises(NumericalError, match="window 1"), line.passes() as passes:
        list(passes.gradients([0, 1]))


# --- targets ahead -----------------------------------------------------------------------------------------------------------


class Targets:
    """Counts the targets that are made; the last pass of batch 0 waits for as many of other batches as are expected."""

    def __init__(self, line: Line, expected: int) -> None:
        self.line, self.made, self.lock = line, list[tuple[int, int | None]](), threading.Lock()
        self.expected, self.enough = expected, threading.Event()
        line.task = replace(line.task, target=self.target, forward=self.forward)
        self.forward_of_line = line.forward

    def target(self, batch: int, windows: slice = ALL) -> UnitOutput:
        with self.lock:
            self.made.append((batch, windows.start))
            if len([b for b, _ in self.made if b > 0]) == self.expected:
                self.enough.set()
        return UnitOutput((3 * self.line.inputs[batch])[windows])

    def forward(self, batch: int, windows: slice = ALL) -> UnitOutput:
        if batch == 0 and windows.start in (None, APART[-1].start):
            assert self.enough.wait(SOON)
        return self.forward_of_line(batch, windows)


def test_idle_workers_make_targets_of_what_is_coming_once() -> None:
    line = Line()
    targets = Targets(line, expected=2)  # three workers, one of them with batch 0
    with line.passes() as passes:
        (first,) = passes.gradients([0], [1, 2, 3])
        assert sorted(targets.made) == [(0, None), (1, None), (2, None)]
        later = list(passes.gradients([1, 2, 3]))
    assert sorted(targets.made) == [(batch, None) for batch in range(4)]
    plain = Line()
    plain.task = replace(plain.task, target=lambda batch: UnitOutput(3 * plain.inputs[batch]))
    with plain.passes() as passes:
        wanted = list(passes.gradients([0, 1, 2, 3]))
    for one, two in zip([first, *later], wanted, strict=True):
        assert torch.equal(one.parts[0], two.parts[0])
        assert one.length == two.length


def test_no_more_targets_are_made_than_workers_are_idle_at_last() -> None:
    line = Line(APART)
    targets = Targets(line, expected=2)  # of four parts the last one is alone
    with line.passes() as passes:
        list(passes.gradients([0], [1]))
    assert [start for batch, start in targets.made if batch == 1] == [0, 1]


def test_nothing_is_made_ahead_where_all_workers_are_busy() -> None:
    line = Line()
    targets = Targets(line, expected=0)
    targets.enough.set()
    with line.passes() as passes:
        list(passes.gradients([0, 1, 2], [3]))
    assert sorted(batch for batch, _ in targets.made) == [0, 1, 2]


def test_an_error_in_a_target_made_ahead_is_raised_in_its_turn() -> None:
    line = Line()
    raised = threading.Event()

    def target(batch: int) -> UnitOutput:
        if batch == 2:
            raised.set()
            raise NumericalError("no target")
        return UnitOutput(3 * line.inputs[batch])

    def forward(batch: int) -> UnitOutput:
        assert raised.wait(SOON)
        return line.forward(batch)

    line.task = replace(line.task, target=target, forward=forward)
    with line.passes() as passes:
        assert len(list(passes.gradients([0], [1, 2]))) == 1
        assert len(list(passes.gradients([1], [2]))) == 1
        with pytest.raises(NumericalError, match="no target"):
            list(passes.gradients([2]))


# --- workers -----------------------------------------------------------------------------------------------------------------


def test_a_cpu_has_as_many_workers_as_torch_has_threads() -> None:
    with Line().passes() as passes:
        assert passes.workers == 3
        seen = list(passes.pool.map(lambda _: torch.get_num_threads(), range(6)))
    assert seen == [1] * 6
    assert torch.get_num_threads() == 3


def test_an_interrupt_ends_passes_under_way_before_their_next_half() -> None:
    line, results = Line(), []
    begun, stopped = threading.Event(), threading.Event()

    def target(batch: int, windows: slice = ALL) -> UnitOutput:
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
