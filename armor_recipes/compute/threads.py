"""Several pieces of work at once, each computing on one thread of torch."""

from __future__ import annotations

import mmap
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

import torch

from armor_recipes.compute.ranks import in_turn, share

T = TypeVar("T")
R = TypeVar("R")
#: Bytes that a thread may take as it begins.
_STACK = 1 << 24
#: Pieces of work at once where torch computes on one thread. A worker of a pool has a context of its own, and so none.
_pieces: ContextVar[int] = ContextVar("pieces", default=0)


def at_once() -> int:
    """How many pieces of work to compute at once: as many as torch has threads, or had before `side_by_side`."""
    return _pieces.get() or torch.get_num_threads()


@contextmanager
def side_by_side() -> Iterator[None]:
    """Compute on one thread, and as many pieces of work at once as torch had threads.

    For all whose bits are kept: those of products, of sums and of the ends of loops over a tensor depend on the number of threads.
    """
    with _one_thread(at_once()):
        yield


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose workers compute on one thread each, so that no bit depends on how many there are.

    On an error or interrupt what has not begun never does; what is under way ends first. Raises MemoryError where there is no room
    for their stacks: a thread that begins where memory has run out may never say that it did, and is waited for for ever.
    """
    _reserve(workers * _STACK)
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


def _reserve(size: int) -> None:
    """Ask for so many bytes, and give them back untouched. Raises MemoryError."""
    try:
        mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()
    except OSError as error:
        raise MemoryError(f"no room for {size} bytes of threads' stacks") from error


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread here, one piece at a time: for sums over a tensor, and to measure what a piece takes."""
    with _one_thread(0):
        yield


@contextmanager
def _one_thread(pieces: int) -> Iterator[None]:
    threads, token = torch.get_num_threads(), _pieces.set(pieces)
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        _pieces.reset(token)


def in_order(function: Callable[[T], R], items: Sequence[T], *, on_cpu: bool) -> Iterator[R]:
    """What the function gives for each item, in order: several at once on a CPU, each on one thread; ranks share them out.

    Gradients are on or off in it as they are here. An error is raised in its turn, the first in order.
    """
    own = share(items)
    if not on_cpu:
        yield from in_turn(map(function, own), len(items))
        return
    grad = torch.is_grad_enabled()  # of this thread alone

    def run(item: T) -> R:
        with torch.set_grad_enabled(grad):
            return function(item)

    workers = max(1, min(at_once(), len(own)))
    with one_thread_each(workers) as pool:
        # One more than there are workers: whoever is done first need not wait until those before it are taken.
        yield from in_turn(results_in_order(pool, run, own, at_once=workers + 1), len(items))


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
