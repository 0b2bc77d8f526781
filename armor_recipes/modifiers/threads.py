"""Several pieces of work at once, each computing on one thread of torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose workers compute on one thread each, so that no bit depends on how many there are.

    On an error or interrupt what has not begun never does; what is under way ends first.
    """
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            try:
                yield pool
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:  # of all threads to come: a worker's own setting is torch's default for threads that start after it
        torch.set_num_threads(threads)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread here: for sums over a tensor, whose bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def results_in_order(pool: Executor, function: Callable[[T], R], items: Iterable[T], *, at_once: int) -> Iterator[R]:
    """What the function gives for each item, in order; at most so many are under way or wait for one before them.

    So results that take memory do not pile up. An error is raised in its turn, the first in order; those behind it that have not
    begun never do.
    """
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            if len(pending) == at_once:
                yield pending.popleft().result()
            pending.append(pool.submit(function, item))
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()
