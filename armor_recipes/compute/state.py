"""Torch as it is in a new process, for as long as we compute: whatever a caller has set is put aside, and put back.

| switch | while we compute |
|---|---|
| `torch.set_default_dtype` | float32 |
| `torch.set_default_device`, `with torch.device(…)` | the CPU |
| `torch.autocast` of any device type | off |
| `torch.inference_mode`, `torch.no_grad` | off: who computes without gradients says so itself |
| `torch.set_float32_matmul_precision`, `torch.backends.….fp32_precision` | full float32 |

Left as they are: `torch.use_deterministic_algorithms`, which changes no bit of ours on a CPU; the choice of attention kernels
(`torch.nn.attention.sdpa_kernel`), as part of the attention implementation; and the number of threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

_FULL_PRECISION = ("ieee", "none")
_SEED = 0


@contextmanager
def plain_torch() -> Iterator[None]:
    """Compute in a fresh process's state of torch, as a context or a decorator. Default dtype and precision are the process's.

    So another thread sees float32 for as long; the rest is of this thread alone.
    """
    dtype = torch.get_default_dtype()
    with ExitStack() as stack:
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        if torch.get_default_device().type != "cpu":  # a device mode costs a little in every call
            stack.enter_context(torch.device("cpu"))
        for device_type in _autocast_types():
            stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_full_precision())
        yield


@contextmanager
def drawn_alike(device: torch.device) -> Iterator[None]:
    """Inside, torch's global random numbers (the CPU's, a GPU `device`'s) begin anew, the same each time; then they go on.

    For models that draw in evaluation mode, too (random masks, noise). They are the process's: not for several threads at once.
    """
    on_cuda = device.type == "cuda"
    with torch.random.fork_rng([device] if on_cuda else []):
        torch.default_generator.manual_seed(_SEED)
        if on_cuda:
            torch.cuda.default_generators[device.index or 0].manual_seed(_SEED)
        yield


def _autocast_types() -> list[str]:
    accelerator = torch.accelerator.current_accelerator()
    known = ["cpu", *([accelerator.type] if accelerator is not None else [])]
    return [device_type for device_type in known if torch.is_autocast_enabled(device_type)]


@contextmanager
def _full_precision() -> Iterator[None]:
    """Products of float32 in float32: no TF32, no bfloat16."""
    mkldnn: Any = torch.backends.mkldnn
    switches: tuple[Any, ...] = (torch.backends, torch.backends.cuda.matmul, mkldnn, mkldnn.matmul)
    before = [(switch, switch.fp32_precision) for switch in switches]
    lowered = [(switch, value) for switch, value in before if value not in _FULL_PRECISION]
    try:
        for switch, _ in lowered:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in lowered:
            switch.fp32_precision = value
