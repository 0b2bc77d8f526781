"""The passes of a training: several at once, and what they give put together in a fixed order."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from armor_recipes.errors import NumericalError
from armor_recipes.modifiers.kinds.refiner import RefineTask, UnitOutput
from armor_recipes.modifiers.threads import one_thread, one_thread_each, results_in_order


class Measure(Protocol):
    """What a refiner says of outputs."""

    def loss(self, found: UnitOutput, wanted: UnitOutput) -> Tensor:
        """Scalar loss of a batch or of some of its windows, differentiable in what is found."""

    def weight(self, wanted: UnitOutput) -> float:
        """How much some windows count in their batch, whose loss is the mean of its parts' by these."""


@dataclass(frozen=True, slots=True)
class BatchGradient:
    """Of one batch's loss: `scale` times the parts, one for each parameter; `length` is that of all of it."""

    parts: Sequence[Tensor]
    scale: float
    length: float


@dataclass(frozen=True, slots=True)
class _Part:
    """What one worker computes by itself: a batch, or some windows of it."""

    batch: int
    windows: slice | None = None


@dataclass(frozen=True, slots=True)
class _Found:
    """Of a part: its loss, how much it counts in its batch, and its gradient. The length is left out where others follow."""

    loss: float
    weight: float
    gradient: tuple[Tensor, ...] = ()
    length: float | None = None


@dataclass(frozen=True, slots=True)
class Passes:
    """Forward and backward passes of a unit that is trained: several parts of batches at once, each on one thread.

    What they give is put together in their order, so that no bit depends on how many run at once.
    """

    task: RefineTask
    parameters: Sequence[nn.Parameter]
    measure: Measure
    pool: Executor
    workers: int
    _stopped: threading.Event = field(default_factory=threading.Event)

    def gradients(self, batches: Sequence[int]) -> Iterator[BatchGradient]:
        """Of each batch, in order. Raises NumericalError where a loss or a gradient is not finite."""
        parts = [part for batch in batches for part in self._parts(batch)]
        # One more than there are workers: whoever is done first need not wait until those before it are taken.
        found = results_in_order(self.pool, self._gradient, parts, at_once=self.workers + 1)
        for batch in batches:
            yield _batch_gradient(islice(found, len(self._parts(batch))))

    def losses(self, batches: Sequence[int]) -> list[float]:
        """Of each batch, without gradients. Raises NumericalError where one is not finite."""
        found = self.pool.map(self._value, [part for batch in batches for part in self._parts(batch)])
        return [_batch_loss(list(islice(found, len(self._parts(batch))))) for batch in batches]

    def stop(self) -> None:
        """Let passes under way end as soon as they can."""
        self._stopped.set()

    def _parts(self, batch: int) -> list[_Part]:
        parts = self.task.parts[batch] if self.task.parts else ()
        return [_Part(batch, windows) for windows in parts] if len(parts) > 1 else [_Part(batch)]

    def _gradient(self, part: _Part) -> _Found:
        with torch.enable_grad():
            loss, weight = self._loss(part)
            self._go_on()
            # A parameter that the part does not reach (an expert that no token went to) gets zeros.
            gradient = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        return _Found(float(loss.detach()), weight, gradient, _length(gradient) if part.windows is None else None)

    def _value(self, part: _Part) -> _Found:
        with torch.no_grad():
            loss, weight = self._loss(part)
        return _Found(float(loss), weight)

    def _loss(self, part: _Part) -> tuple[Tensor, float]:
        """The part's loss, and its weight."""
        asked = (part.batch,) if part.windows is None else (part.batch, part.windows)
        self._go_on()
        with torch.no_grad():
            target = self.task.target(*asked)
            weight = 1.0 if part.windows is None else self.measure.weight(target)
        self._go_on()
        return self.measure.loss(self.task.forward(*asked), target), weight

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise CancelledError


def _batch_gradient(found: Iterator[_Found]) -> BatchGradient:
    """The parts' gradients summed in their order, each as soon as it comes.

    The first one counts once and the others in proportion, so that nothing is rounded where there is one. Those of weight 0 are
    left out.
    """
    total: list[Tensor] = []
    first, weights = 1.0, 0.0
    length: float | None = None
    for part in found:
        if not part.weight:
            continue
        finite(part.loss, "loss")
        if total:
            _add(total, part.gradient, part.weight / first)
        else:
            total, first, length = list(part.gradient), part.weight, part.length
        weights += part.weight
    scale = first / finite(weights or math.nan, "loss")
    if length is None:
        with one_thread():
            length = scale * _length(total)
    return BatchGradient(total, scale, finite(length, "gradient"))


def _add(total: list[Tensor], parts: Sequence[Tensor], share: float) -> None:
    """Not in place: two parts may be one tensor. Two roundings for each number: fused ones would depend on its place."""
    for index, part in enumerate(parts):
        total[index] = total[index] + (part if share == 1 else part * share)


def _length(parts: Sequence[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(part) for part in parts])))


def _batch_loss(found: Sequence[_Found]) -> float:
    """The mean of the parts' losses by their weights."""
    total = sum(part.weight for part in found)
    losses = [part.loss * (part.weight / total) for part in found if part.weight]
    return finite(sum(losses) if losses else math.nan, "loss")


@contextmanager
def passes_of(task: RefineTask, parameters: Sequence[nn.Parameter], measure: Measure) -> Iterator[Passes]:
    """On a CPU as many at once as torch has threads, on one thread each; a GPU has them one after the other.

    Where the block is left by an error or interrupt, passes under way end at their next half.
    """
    workers = torch.get_num_threads() if parameters[0].device.type == "cpu" else 1
    with one_thread_each(workers) as pool:
        found = Passes(task, parameters, measure, pool, workers)
        try:
            yield found
        except BaseException:
            found.stop()
            raise


def finite(number: float, what: str) -> float:
    """The number itself. Raises NumericalError."""
    if not math.isfinite(number):
        raise NumericalError(f"a training {what} is {number}: lower `learning_rate`, or check the model's weights")
    return number
