"""What a plan will take on this machine: estimates, for `--plan` and the report, never for a decision."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from armor_recipes.model.facts import model_facts
from armor_recipes.modifiers import AnyModifier
from armor_recipes.modifiers.kinds.contract import Row, calibration_tokens
from armor_recipes.plan.experts import held_bytes
from armor_recipes.plan.plan import Plan
from armor_recipes.recipe import Recipe
from armor_recipes.recipe.schema import CalibrationSpec

#: Bytes of a value while computing on a CPU: float32.
_VALUE = 4
#: Passes of the blocks over the calibration tokens: one to observe, one to go on.
_PASSES = 2


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """For this machine: `peak_bytes` of memory, and `seconds` without evaluation."""

    peak_bytes: int
    seconds: float


def estimate_run(
    plan: Plan, recipe: Recipe, model: nn.Module, modifiers: Mapping[str, AnyModifier[Any]]
) -> RunEstimate:
    """Measure what a product takes here and now, and add up the plan's work. `model` may be on the meta device."""
    needs = {entry.key: modifiers[entry.key].needs for entry in recipe.modifiers}
    specs = {entry.key: entry.config.calibration for entry in recipe.modifiers}
    held: set[tuple[CalibrationSpec, str]] = set()
    back: set[CalibrationSpec] = set()
    for key, spec in specs.items():
        if spec is not None:
            held |= {(spec, kind) for kind in needs[key].streams}
            held |= {(spec, "inputs of the dense block")} if needs[key].dense == "block" else set()
            back |= {spec} if needs[key].gradients else set()
    tokens = sum(calibration_tokens(spec) for spec, _ in held)
    passed = tokens + sum(map(calibration_tokens, back))
    places: dict[tuple[str, int, str], list[int]] = {}
    for row in plan.modules:
        places.setdefault((row.stage, row.layer, row.modifier), []).append(row.peak_bytes)
    others = [_with_parts(row) for row in plan.rows if not row.takes]
    parameters = sum(p.numel() for p in model.parameters())
    return RunEstimate(
        peak_bytes=estimate_peak_bytes(
            model,
            tokens,
            solve_bytes=max([0, *map(bytes_at_once, places.values()), *others]) + held_bytes(plan.rows, modifiers),
            probe=max((spec.sequence_length for spec in specs.values() if spec is not None), default=0),
        ),
        seconds=estimate_seconds(plan.flops, parameters, passed),
    )


def bytes_at_once(solves: Sequence[int]) -> int:
    """Working memory of one layer's solves: of the largest, as many as a CPU solves at once."""
    return sum(sorted(solves, reverse=True)[: torch.get_num_threads()])


def _with_parts(row: Row) -> int:
    """Working memory of a step with as many of its parts as a CPU computes at once."""
    parts, size = row.side_by_side
    return row.peak_bytes + bytes_at_once([size] * parts)


def estimate_peak_bytes(model: nn.Module, tokens: int, *, solve_bytes: int, probe: int = 0) -> int:
    """The process as it is, the model, and the larger of: activations with solves, or a second copy of the model to verify.

    Verifying compares the logits of both for `probe` tokens, which are many where the vocabulary is large.
    """
    hidden = model_facts(model).hidden_size or 0
    weights = _VALUE * sum(p.numel() for p in model.parameters())
    activations = _VALUE * hidden * tokens
    verifying = 2 * (weights + _VALUE * probe * _vocabulary(model))
    return resident_bytes() + weights + max(activations + solve_bytes, verifying)


def _vocabulary(model: nn.Module) -> int:
    """Rows of the head that gives logits of tokens; 0 without one."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return 0 if weight is None else len(weight)


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
