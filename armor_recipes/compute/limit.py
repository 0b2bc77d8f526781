"""A bound on the process's own memory that the system keeps."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

from armor_recipes.compute.memory import give_back_large, process_bytes
from armor_recipes.errors import ResourceError
from armor_recipes.exhaustion import is_out_of_memory


def private_bytes() -> int:
    """Private memory that this process may write to, touched or not: what Linux counts against RLIMIT_DATA (0 elsewhere).

    Anonymous memory is never more; mapped files that are shared are no part of it.
    """
    return process_bytes("VmData")


@contextmanager
def limited(nbytes: int | None, what: str) -> Iterator[None]:
    """Let allocations fail inside that would take more private memory in all; None sets no bound. `what` names it in messages.

    Raises ResourceError where one failed.
    """
    if nbytes is None:
        yield
        return
    give_back_large()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    bounds = [nbytes, *(one for one in (soft, hard) if one != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(bounds), hard))
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not is_out_of_memory(cause):
            cause = cause.__cause__
        if cause is None:
            raise
        raise ResourceError(
            f"{what} ran out ({str(cause).splitlines()[0] if str(cause) else type(cause).__name__}): set more, or lower the "
            "batch_size and sequence_length of the calibration and of what is evaluated"
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
