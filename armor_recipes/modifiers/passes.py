"""The passes of a training: several at once, and what they give put together in a fixed order."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from armor_recipes.compute.ranks import in_turn, share
from armor_recipes.compute.threads import at_once, one_thread, one_thread_each, results_in_order
from armor_recipes.errors import NumericalError
from armor_recipes.modifiers.kinds.refiner import RefineTask, UnitOutput


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
    """What one worker computes by itself: a batch, or its windows from `start` to before `stop`."""

    batch: int
    start: int | None = None
    stop: int | None = None

    @property
    def whole(self) -> bool:
        """Whether it is all of the batch."""
        return self.start is None

    @property
    def asked(self) -> tuple[Any, ...]:
        """What the unit is asked for."""
        return (self.batch,) if self.whole else (self.batch, slice(self.start, self.stop))


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
    _ahead: dict[_Part, Future[UnitOutput]] = field(default_factory=dict)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def gradients(self, batches: Sequence[int], coming: Sequence[int] = ()) -> Iterator[BatchGradient]:
        """Of each batch, in order. Raises NumericalError where a loss or a gradient is not finite.

        Workers that are left idle make targets of the batches that are coming, which no step changes: as many as are idle while
        the last parts are computed, so that they take no more memory than a busy worker would.
        """
        count, parts, later = len(self._parts(batches)), share(self._parts(batches)), share(self._parts(coming))
        # One more than there are workers: whoever is done first need not wait until those before it are taken.
        own = results_in_order(self.pool, self._gradient, self._and_ahead(parts, later), at_once=self.workers + 1)
        found = in_turn(own, count)
        for batch in batches:
            yield _batch_gradient(islice(found, len(self._parts([batch]))))

    def losses(self, batches: Sequence[int]) -> list[float]:
        """Of each batch, without gradients. Raises NumericalError where one is not finite."""
        parts = self._parts(batches)
        found = in_turn(self.pool.map(self._value, share(parts)), len(parts))
        return [_batch_loss(list(islice(found, len(self._parts([batch]))))) for batch in batches]

    def stop(self) -> None:
        """Let passes under way end as soon as they can."""
        self._stopped.set()

    def _parts(self, batches: Sequence[int]) -> list[_Part]:
        found = []
        for batch in batches:
            parts = self.task.parts[batch] if self.task.parts else ()
            found += [_Part(batch, part.start, part.stop) for part in parts] if len(parts) > 1 else [_Part(batch)]
        return found

    def _and_ahead(self, parts: Sequence[_Part], later: Sequence[_Part]) -> Iterator[_Part]:
        """The parts; behind the last one targets of later parts are begun."""
        yield from parts
        for part in later[: -len(parts) % self.workers]:
            self._ahead[part] = self.pool.submit(self._new_target, part)

    def _gradient(self, part: _Part) -> _Found:
        with torch.enable_grad():
            loss, weight = self._loss(part)
            self._go_on()
            # A parameter that the part does not reach (an expert that no token went to) gets zeros.
            gradient = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        return _Found(float(loss.detach()), weight, gradient, _length(gradient) if part.whole else None)

    def _value(self, part: _Part) -> _Found:
        with torch.no_grad():
            loss, weight = self._loss(part)
        return _Found(float(loss), weight)

    def _loss(self, part: _Part) -> tuple[Tensor, float]:
        """The part's loss, and its weight."""
        target = self._target(part)
        with torch.no_grad():
            weight = 1.0 if part.whole else self.measure.weight(target)
        self._go_on()
        return self.measure.loss(self.task.forward(*part.asked), target), weight

    def _target(self, part: _Part) -> UnitOutput:
        """The one made ahead, or one of now where nobody has begun with it."""
        begun = self._ahead.pop(part, None)
        return self._new_target(part) if begun is None or begun.cancel() else begun.result()

    def _new_target(self, part: _Part) -> UnitOutput:
        self._go_on()
        with torch.no_grad():
            return self.task.target(*part.asked)

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
    workers = at_once() if parameters[0].device.type == "cpu" else 1
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
