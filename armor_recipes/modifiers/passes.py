"""The passes of a training: several at once, and what they give put together in a fixed order."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Executor
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from armor_recipes.errors import NumericalError
from armor_recipes.modifiers.kinds.refiner import RefineTask, UnitOutput
from armor_recipes.modifiers.threads import one_thread_each, results_in_order


@dataclass(frozen=True, slots=True)
class BatchGradient:
    """Of one batch's loss: its parts, one for each parameter, and their common length."""

    parts: tuple[Tensor, ...]
    length: float


@dataclass(frozen=True, slots=True)
class Passes:
    """Forward and backward passes of a unit that is trained, batch by batch; `loss` is a refiner's."""

    task: RefineTask
    parameters: Sequence[nn.Parameter]
    loss: Callable[[UnitOutput, UnitOutput], Tensor]
    pool: Executor
    workers: int
    _stopped: threading.Event = field(default_factory=threading.Event)

    def gradients(self, batches: Sequence[int]) -> Iterator[BatchGradient]:
        """Of each batch, in order. Raises NumericalError where a loss or a gradient is not finite."""
        # One more than there are workers: whoever is done first need not wait until those before it are taken.
        return results_in_order(self.pool, self._gradient, batches, at_once=self.workers + 1)

    def losses(self, batches: Sequence[int]) -> list[float]:
        """Of each batch, without gradients. Raises NumericalError where one is not finite."""
        return list(self.pool.map(self._value, batches))

    def stop(self) -> None:
        """Let passes under way end as soon as they can."""
        self._stopped.set()

    def _gradient(self, batch: int) -> BatchGradient:
        with torch.enable_grad():
            loss = self._loss(batch)
            self._go_on()
            # A parameter that the batch does not reach (an expert that no token went to) gets zeros.
            parts = torch.autograd.grad(loss, self.parameters, allow_unused=True, materialize_grads=True)
        finite(float(loss.detach()), "loss")
        lengths = torch.stack([torch.linalg.vector_norm(part) for part in parts])
        return BatchGradient(parts, finite(float(torch.linalg.vector_norm(lengths)), "gradient"))

    def _value(self, batch: int) -> float:
        with torch.no_grad():
            return finite(float(self._loss(batch)), "loss")

    def _loss(self, batch: int) -> Tensor:
        self._go_on()
        with torch.no_grad():
            target = self.task.target(batch)
        self._go_on()
        return self.loss(self.task.forward(batch), target)

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise CancelledError


@contextmanager
def passes_of(
    task: RefineTask, parameters: Sequence[nn.Parameter], loss: Callable[[UnitOutput, UnitOutput], Tensor]
) -> Iterator[Passes]:
    """On a CPU as many passes at once as torch has threads, on one thread each; a GPU has them one by one.

    Where the block is left by an error or interrupt, passes under way end at their next half.
    """
    workers = torch.get_num_threads() if parameters[0].device.type == "cpu" else 1
    with one_thread_each(workers) as pool:
        found = Passes(task, parameters, loss, pool, workers)
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
