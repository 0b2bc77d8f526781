"""What of a recipe rests on a measurement of the model: measured once its weights are loaded, before anything is changed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedModel

from armor_recipes.calibration.inputs import Batch, InputSet, hash_groups
from armor_recipes.compute import plain_torch
from armor_recipes.compute.ranks import first
from armor_recipes.events import Observer, PhaseStarted
from armor_recipes.integrations.models import (
    attention_of,
    load_model,
    written_dtypes,
)
from armor_recipes.model.facts import model_facts
from armor_recipes.model.forms import linearise
from armor_recipes.model.linears import find_linears
from armor_recipes.model.replay import on_device
from armor_recipes.modifiers import AnyModifier
from armor_recipes.modifiers.base import ModuleShape, Settles, Unsettled
from armor_recipes.modifiers.kinds.contract import located
from armor_recipes.modifiers.kinds.served import served_shapes
from armor_recipes.plan import estimate_run
from armor_recipes.recipe import ModifierEntry
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.report.manifest import state_hash
from armor_recipes.run.checks import check_weights
from armor_recipes.run.measurements import keep_costs, kept_costs
from armor_recipes.run.planning import Job, planned
from armor_recipes.run.refusals import resource_errors
from armor_recipes.session.measuring import MEASURING, Trial, change_costs
from armor_recipes.solver.sweep import sweep_form
from armor_recipes.version import __version__, release_of


@dataclass(frozen=True, slots=True)
class Measured:
    """A measurement for one entry: `costs` in nats a token by module, and whether they were `kept` from a run before."""

    modifier: str
    windows: int
    costs: Mapping[str, float]
    kept: bool
    seconds: float
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for report.json."""
        return {
            "modifier": self.modifier,
            "windows": self.windows,
            "kept": self.kept,
            "seconds": round(self.seconds, 3),
            "notes": list(self.notes),
            "costs": dict(self.costs),
        }


def is_settled(job: Job) -> bool:
    """Whether the job's plan is what will be run."""
    return not any(_unsettled(modifier) for modifier in job.modifiers.values())


def settled(
    job: Job, model: PreTrainedModel, tokens: Mapping[CalibrationSpec, InputSet], observer: Observer
) -> tuple[Job, tuple[Measured, ...]]:
    """The job with all settled, and what was measured for that. The model has the plan's linear forms and is left as it is.

    Raises PlanError where the model has no logits, or what is asked for cannot be had; NumericalError.
    """
    configs, found = {}, []
    for entry in job.recipe.modifiers:
        modifier = job.modifiers[entry.key]
        asked = _unsettled(modifier)
        if asked is None:
            continue
        settling: Any = modifier
        plain = [replace(row.shape, block_size=None) for row in job.plan.modules if row.modifier == entry.key]
        shapes = served_shapes(plain, find_linears(job.shapes), model_facts(job.shapes), job.recipe)
        with located(entry, asked.key):
            measured = _measured(_Asked(job, model, entry, asked, settling, shapes), tokens, observer)
            configs[entry.key] = settling.settle(shapes, measured.costs)
        found.append(measured)
    if not configs:
        return job, ()
    recipe = job.recipe.settled(configs)
    instances = {key: type(one)(configs.get(key, one.config)) for key, one in job.modifiers.items()}
    plan = planned(recipe, job.source, job.shapes, instances)
    estimate = job.estimate.without("measuring") if all(one.kept for one in found) else job.estimate
    return replace(job, recipe=recipe, modifiers=instances, plan=plan, estimate=estimate), tuple(found)


@dataclass(frozen=True, slots=True)
class _Asked:
    """What one entry asks to be measured."""

    job: Job
    model: PreTrainedModel
    entry: ModifierEntry
    unsettled: Unsettled
    modifier: Settles
    shapes: Sequence[ModuleShape]

    def of(self, windows: Sequence[Batch]) -> dict[str, Any]:
        """All that the measurement depends on."""
        job, source = self.job, self.job.source
        compute = job.device.type
        return {
            "modifier": self.entry.kind,
            "settings": dict(self.unsettled.settings),
            "model": state_hash(self.model, written_dtypes(self.model, source), source.stored_dtype),
            "inputs": hash_groups(windows),
            "shapes": {shape.name: [shape.d_out, shape.d_in] for shape in self.shapes},
            "compute": [compute, str(source.compute_dtype), sweep_form(compute), attention_of(self.model)],
            "versions": {
                "armor_recipes": __version__,
                **{name: release_of(name) for name in ("torch", "transformers")},
            },
        }

    def costs(self, windows: Sequence[Batch], observer: Observer) -> dict[str, float]:
        """Measured now."""
        trials = [Trial(shape, partial(self.modifier.trial, shape), self.unsettled.gradients) for shape in self.shapes]
        batches = [on_device(window, self.model) for window in windows]
        return change_costs(self.model, trials, batches, seed=self.entry.config.seed, observer=observer)


def _unsettled(modifier: AnyModifier[Any]) -> Unsettled | None:
    return modifier.unsettled if isinstance(modifier, Settles) else None


def _measured(asked: _Asked, tokens: Mapping[CalibrationSpec, InputSet], observer: Observer) -> Measured:
    """Taken now, or kept from a run before."""
    started, key, spec = time.perf_counter(), asked.entry.key, asked.entry.config.calibration
    assert spec is not None, "what is measured is calibrated"
    windows = _windows(tokens[spec], asked.unsettled.windows)
    of = asked.of(windows)
    costs, wrong = first(lambda: kept_costs(of, [shape.name for shape in asked.shapes]))
    if costs is not None:
        return Measured(key, len(windows), costs, kept=True, seconds=time.perf_counter() - started)
    if wrong:
        observer(PhaseStarted(wrong))
    costs = asked.costs(windows, observer)
    not_kept = first(partial(keep_costs, of, costs))
    notes = tuple(text for text in (wrong, not_kept) if text)
    return Measured(key, len(windows), costs, kept=False, seconds=time.perf_counter() - started, notes=notes)


def _windows(inputs: InputSet, count: int) -> list[Batch]:
    """So many of the samples, evenly spread, each by itself."""
    count = min(count, len(inputs))
    return [inputs.sample(place * len(inputs) // count) for place in range(count)]


@plain_torch()
def settled_before(job: Job, observer: Observer) -> Job:
    """The job as a run would settle it: data are read and weights loaded for that.

    One with steps of llm-compressor, which change the weights before anything is measured, stays as it is.
    """
    if is_settled(job) or job.recipe.steps:
        return job
    with resource_errors():
        data = job.data(evaluation=False)
        observer(PhaseStarted("load weights"))
        model = load_model(job.source, device=job.device)
        linearise(model, job.plan.forms)
        check_weights(model, job.plan)
        observer(PhaseStarted(MEASURING))
        found, _ = settled(job, model, data.tokens, observer)
    return replace(found, estimate=estimate_run(found.plan, found.recipe, found.shapes, found.modifiers))
