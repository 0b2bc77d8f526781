"""What a run gives back to Python, and what its summary is printed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armor_recipes.evaluation.perplexity import Perplexity
from armor_recipes.session import ModuleResult, Plan, RearrangeResult, RefineResult


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run.

    Attributes:
        plan: what was planned, and so what was done.
        output: the folder of the checkpoint.
        modules: by full name, in the order in which they were solved.
        rearrangements: what was reordered before, in order, with what masks keep of the score in the old and the new order.
        refinements: what refiners trained, in order, with held-out losses.
        perplexity_before: of the dense model; None where the recipe has no `evaluation`.
        perplexity_after: of the compressed model, as a loader of the folder gives it.
        report: everything that is not a function of the inputs: seconds by phase, peak memory, sizes, host.
    """

    plan: Plan
    output: Path
    modules: Mapping[str, ModuleResult]
    rearrangements: Sequence[RearrangeResult]
    refinements: Sequence[RefineResult]
    perplexity_before: Perplexity | None
    perplexity_after: Perplexity | None
    report: Mapping[str, Any]
