"""What a run gives back to Python, and what its summary is printed from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armor_recipes.evaluation import Evaluation, Perplexity
from armor_recipes.modifiers.kinds.changes import ModuleResult, StepResult
from armor_recipes.modifiers.kinds.rearranger import RearrangeResult
from armor_recipes.modifiers.kinds.refiner import RefineResult
from armor_recipes.plan import Plan, RunEstimate


@dataclass(frozen=True, slots=True)
class Result:
    """A finished run.

    Attributes:
        plan: what was planned, and so what was done.
        estimate: what that was thought to take.
        output: the folder of the checkpoint.
        modules: by full name, in the order in which they were solved.
        results: what was measured besides modules, in order.
        evaluations: what was measured of the dense model, and of the compressed one as a loader of the folder gives it.
        promise: with a lock, what was held against it, in a sentence.
        report: everything that is not a function of the inputs: seconds by phase, peak memory, sizes, host.
    """

    plan: Plan
    estimate: RunEstimate
    output: Path
    modules: Mapping[str, ModuleResult]
    results: Sequence[StepResult]
    evaluations: Sequence[Evaluation]
    report: Mapping[str, Any]
    promise: str | None = None

    @property
    def perplexity_before(self) -> Perplexity | None:
        """Of the dense model; None where the recipe does not ask for it."""
        return next((e.before for e in self.evaluations if isinstance(e.before, Perplexity)), None)

    @property
    def perplexity_after(self) -> Perplexity | None:
        """Of the compressed model."""
        return next((e.after for e in self.evaluations if isinstance(e.after, Perplexity)), None)

    @property
    def rearrangements(self) -> tuple[RearrangeResult, ...]:
        """What was reordered, in order, with what masks keep of the score in the old and the new order."""
        return self._section(RearrangeResult.section)

    @property
    def refinements(self) -> tuple[RefineResult, ...]:
        """What refiners trained, in order, with held-out losses."""
        return self._section(RefineResult.section)

    def _section(self, name: str) -> tuple[Any, ...]:
        return tuple(result for result in self.results if result.section == name)
