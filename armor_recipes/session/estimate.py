"""What a run will take on this machine: estimates, for `--plan` and the report, never for a decision."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from armor_recipes.recipe.schema import AtMost, CalibrationSpec

#: Bytes of a value while computing on a CPU: float32.
_VALUE = 4
#: Passes of the decoder layers over the calibration tokens: one to observe, one to go on.
_PASSES = 2


def calibration_tokens(spec: CalibrationSpec) -> int:
    """Tokens that a calibration takes at most."""
    samples = spec.samples.at_most if isinstance(spec.samples, AtMost) else spec.samples
    return samples * spec.sequence_length


def bytes_at_once(solves: Sequence[int]) -> int:
    """Working memory of one layer's solves: of the largest, as many as a CPU solves at once."""
    return sum(sorted(solves, reverse=True)[: torch.get_num_threads()])


def estimate_peak_bytes(model: nn.Module, tokens: int, *, solve_bytes: int) -> int:
    """The process as it is, the model, and the larger of: activations with solves, or a second copy of the model to verify."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config  # of a composite one
    hidden = getattr(text, "hidden_size", 0) or 0
    weights = _VALUE * sum(p.numel() for p in model.parameters())
    activations = _VALUE * hidden * tokens
    return resident_bytes() + weights + max(activations + solve_bytes, 2 * weights)


def estimate_seconds(solve_flops: float, parameters: int, tokens: int) -> float:
    """Solves and calibration passes at the speed of a product of the size that solves are made of, measured here and now."""
    return round((solve_flops + _PASSES * 2.0 * parameters * tokens) / _flops_per_second(), 1)


def resident_bytes() -> int:
    """Memory this process holds now; 0 where the system does not say (`/proc` is Linux's)."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0


def _flops_per_second() -> float:
    left, right = (torch.ones(16, rows, 64, dtype=torch.float32, device="cpu") for rows in (512, 64))
    torch.bmm(left, right)
    started = time.perf_counter()
    for _ in range(10):
        torch.bmm(left, right)
    return 10 * 2.0 * 16 * 512 * 64 * 64 / (time.perf_counter() - started)
