"""Several solves of a block at once, in an order that no thread decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch

from armor_recipes.compute.ranks import by_cost, each, ranks
from armor_recipes.compute.threads import at_once, one_thread_each
from armor_recipes.modifiers.base import SolveProgress

T = TypeVar("T")
#: A job is given what wraps its progress, so that it can be stopped at its next report.
Job = Callable[[Callable[[SolveProgress], SolveProgress]], T]


class _StoppedError(Exception):
    """Ends the other jobs once one of them failed or the run was interrupted."""


def in_order(jobs: Sequence[Job[T]], device: torch.device, costs: Sequence[float] = ()) -> Iterator[T]:
    """What the jobs give, in order; on a CPU as many at once as torch has threads, each on one thread.

    Ranks share them out by their costs, and have all results only when all have theirs: on several, what the jobs cost decides
    who does them, and the first rank's error is raised where several fail.
    """
    costs = costs or [1.0] * len(jobs)
    if ranks().size == 1:
        yield from _side_by_side(jobs, device, costs)
        return
    places = by_cost(costs)
    own = places[ranks().rank]
    found = each(lambda: list(_side_by_side([jobs[i] for i in own], device, [costs[i] for i in own])))
    results = {
        place: one for taken, rank in zip(places, found, strict=True) for place, one in zip(taken, rank, strict=True)
    }
    yield from (results[place] for place in range(len(jobs)))


def _side_by_side(jobs: Sequence[Job[T]], device: torch.device, costs: Sequence[float]) -> Iterator[T]:
    """The jobs of this process.

    On a CPU a solve is made of small products that gain little from a second thread; bits are the same either way. The dearest
    begin first, so that none is left alone at the end. Results come up to the first job that fails, in whatever order they do;
    then the error of the first in order.
    """
    workers = min(at_once(), len(jobs)) if device.type == "cpu" else 1
    stop = _Stop()
    if workers <= 1:
        yield from (job(stop.at_reports) for job in jobs)
        return
    futures: list[Future[T]] = []
    with one_thread_each(workers) as pool:
        try:
            dearest_first = sorted(range(len(jobs)), key=lambda i: -costs[i])
            begun = {i: pool.submit(stop.unless_failed, jobs[i]) for i in dearest_first}
            futures.extend(begun[i] for i in range(len(jobs)))
            for future in futures:
                wait([future])
                if stop.event.is_set():
                    break
                yield future.result()
        finally:
            stop.event.set()
            for future in futures:
                future.cancel()
    _raise_first(futures)


class _Stop:
    """Ends the jobs of one call: those under way at their next report, those to come before they begin."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def unless_failed(self, job: Job[T]) -> T:
        """Do a job, and let the others end if it fails."""
        if self.event.is_set():
            raise _StoppedError
        try:
            return job(self.at_reports)
        except BaseException:
            self.event.set()
            raise

    def at_reports(self, report: SolveProgress) -> SolveProgress:
        """A report that ends the job once another one failed."""

        def progress(done: int, at_most: int, loss: float) -> None:
            if self.event.is_set():
                raise _StoppedError
            report(done, at_most, loss)

        return progress


def _raise_first(futures: Sequence[Future[Any]]) -> None:
    """Raise the error of the first job in order that has one of its own. All are over; those that never began are cancelled."""
    for future in futures:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, _StoppedError):
            raise error
