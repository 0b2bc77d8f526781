"""Several pieces of work at once, each computing on one thread of torch."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch


@contextmanager
def one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose workers compute on one thread each, so that no bit depends on how many there are."""
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool
    finally:  # of all threads to come: a worker's own setting is torch's default for threads that start after it
        torch.set_num_threads(threads)
