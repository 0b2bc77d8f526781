"""How errors tell that disk or memory ran out, whichever library raised them: the one place that knows.

It imports no torch: the command line asks before that is there, and when it is what could not be imported.
"""

from __future__ import annotations

import re
from errno import EDQUOT, EFBIG, ENOMEM, ENOSPC

_FULL = (ENOSPC, EDQUOT, EFBIG)
#: How errors of libraries written in Rust (safetensors, tokenizers) tell what they have no class for.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")
#: What torch says when an allocation fails; on a CPU it raises a plain RuntimeError.
_NO_MEMORY = re.compile(
    r"DefaultCPUAllocator|out of memory|[Cc]annot allocate memory|ALLOC_FAILED|can't start new thread|bad_alloc"
)


def is_disk_full(error: BaseException) -> bool:
    """Whether an error means a full disk, a used-up quota, or a file larger than allowed."""
    return _os_error(error) in _FULL


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    if isinstance(error, MemoryError) or _os_error(error) == ENOMEM:
        return True
    # torch.OutOfMemoryError is a RuntimeError, too
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def what_ran_out(error: BaseException | None) -> str:
    """What disk or memory ran out, in a sentence, if that is why `error` was raised, itself or by its causes; else nothing."""
    while error is not None:
        if is_disk_full(error):
            where = getattr(error, "filename", None) or "the output or of the cache"
            return f"no space left on the disk of {where} ({error}): free some and run again"
        if is_out_of_memory(error):
            said = str(error) or type(error).__name__
            return f"out of memory ({said}): lower calibration samples or batch_size, or use a larger machine"
        error = error.__cause__
    return ""


def _os_error(error: BaseException) -> int | None:
    """The number of the system's error, as an OSError holds it or as the text tells it."""
    if isinstance(error, OSError):
        return error.errno
    told = _OS_ERROR.search(str(error))
    return int(told[1]) if told else None
