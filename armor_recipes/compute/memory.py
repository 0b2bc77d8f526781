"""How errors tell that memory ran out."""

from __future__ import annotations

import torch

#: What torch says when a CPU allocation fails; it raises a plain RuntimeError.
_CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and _CPU_OUT_OF_MEMORY in str(error))
