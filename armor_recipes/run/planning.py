"""From a checked recipe to a plan on a model's shapes: nothing is read but configurations and headers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from armor_recipes.calibration.text import is_soon_read
from armor_recipes.compute import plain_torch
from armor_recipes.errors import PlanError, RecipeError
from armor_recipes.events import WorkEstimated
from armor_recipes.integrations.models import (
    ModelSource,
    load_tokenizer,
    meta_model,
    open_model,
    open_teacher,
)
from armor_recipes.integrations.transformers import check_registered
from armor_recipes.model.forms import forms_of, linearise, restore
from armor_recipes.model.ties import tied_output, untie, untied
from armor_recipes.modifiers import AnyModifier, modifiers
from armor_recipes.modifiers.base import Settles
from armor_recipes.plan import Plan, Rates, RunEstimate, estimate_run, make_plan
from armor_recipes.plan.memory import peak_bytes
from armor_recipes.plan.untying import to_untie
from armor_recipes.recipe import Recipe
from armor_recipes.recipe.llmcompressor import ROTATING
from armor_recipes.run.checks import check_compressed, check_fits, check_lengths, check_streamed, narrowed
from armor_recipes.run.data import Data, read_data
from armor_recipes.run.evaluating import check_measures
from armor_recipes.run.refusals import Refusals, resource_errors
from armor_recipes.session.measuring import MEASURING


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe that was checked and planned on a model's shapes; nothing has been read but configurations."""

    recipe: Recipe
    source: ModelSource
    shapes: PreTrainedModel
    """The model on the meta device."""
    modifiers: Mapping[str, AnyModifier[Any]]
    plan: Plan
    estimate: RunEstimate
    device: torch.device
    teacher: ModelSource | None = None
    """The dense model that a compressed one was made from."""

    @property
    def packed(self) -> bool:
        """Whether factors are kept packed; else they are folded into plain weights."""
        return self.recipe.output.format == "compressed-tensors"

    def data(self, *, evaluation: bool = True, wanted: Callable[[str], bool] = lambda _: True) -> Data:
        """The datasets that are `wanted`, by name, as inputs of the model, with or without those of `evaluation`.

        Raises InputError with all that is wrong, ResourceError where memory or disk run out.
        """
        refused, recipe = Refusals(), self.recipe if evaluation else replace(self.recipe, evaluation=None)
        with resource_errors():
            tokenizer = load_tokenizer(self.source)
            data = read_data(recipe, self.source, self.shapes, self.modifiers, tokenizer, refused, wanted=wanted)
        if refused:
            refused.tell()
        return data


@plain_torch()
def prepare(recipe: Recipe, *, device: str = "cpu") -> Job:
    """Plan a recipe on the meta device. Raises PlanError with every problem found, InputError where the model has no config.

    Of a recipe that is refused the data are read, too, as far as that takes no more than seconds: what is wrong with them is told
    in the same go.
    """
    target = parse_device(device)
    source = open_model(recipe.model, device=target)
    if recipe.output.format == "compressed-tensors":
        check_registered()
    known = modifiers()
    instances = {entry.key: known[entry.kind](entry.config) for entry in recipe.modifiers}
    shapes = meta_model(source)
    plan, teacher, refused = None, None, Refusals()
    with refused.noted():
        check_lengths(recipe, source)
    with refused.noted():
        check_compressed(recipe, source)
    with refused.noted():
        teacher = open_teacher(recipe.model, source, shapes, target)
    check_measures(recipe, shapes, refused)
    if recipe.is_theirs and recipe.output.format != "compressed-tensors":
        text = "what llm-compressor makes of the whole recipe is written in its own formats: remove it"
        refused.found.append(PlanError(f"output.format {recipe.output.format}: {text}"))
    with refused.noted():
        plan = planned(recipe, source, shapes, instances)
        if recipe.model.memory is not None and (plan.forms or plan.untied):
            named = ", ".join((*plan.forms, *plan.untied)[:4])
            raise PlanError(
                f"model.memory {recipe.model.memory}: {named} are made linear, or get a weight of their own, which copies "
                "weights in memory; add them to `ignore`, or leave `memory` out"
            )

    def peak(asked: Recipe) -> int:
        made, model = {entry.key: known[entry.kind](entry.config) for entry in asked.modifiers}, meta_model(source)
        plan, size = planned(asked, source, model, made), source.compute_dtype.itemsize
        return peak_bytes(plan, asked, model, made, itemsize=size)

    with refused.noted():
        check_streamed(recipe, source, target, instances, None if plan is None else peak)
    if plan is None or refused:
        with refused.noted(), resource_errors():
            read_data(recipe, source, shapes, instances, load_tokenizer(source), refused, wanted=is_soon_read)
        refused.tell()
    estimate = estimate_run(plan, recipe, shapes, instances, itemsize=source.compute_dtype.itemsize)
    check_fits(recipe, estimate.peak_bytes, peak)
    return Job(recipe, source, shapes, instances, plan, estimate, target, teacher)


def estimated(job: Job, *, tokens: int | None = None, rates: Rates | None = None) -> RunEstimate:
    """The estimate once it is known how many `tokens` are evaluated, or how fast this machine is with this model."""
    size = job.source.compute_dtype.itemsize
    return estimate_run(job.plan, job.recipe, job.shapes, job.modifiers, rates=rates, evaluated=tokens, itemsize=size)


def work_estimated(job: Job, measures: Mapping[str, int]) -> WorkEstimated:
    """The run's estimate by phases; `measures` maps the names of evaluation's measures to their tokens."""
    seconds = dict(job.estimate.cpu_seconds_by)
    ends, evaluation, measuring = (seconds.pop(name, 0.0) for name in ("ends", "evaluation", "measuring"))
    each = evaluation / 2
    phases = {"evaluate before": each, MEASURING: measuring, "compress": sum(seconds.values()), "evaluate after": each}
    return WorkEstimated(phases, ends, measures)


def planned(
    recipe: Recipe, source: ModelSource, shapes: PreTrainedModel, instances: Mapping[str, AnyModifier[Any]]
) -> Plan:
    """The plan on a meta model, of which all that can be is linear meanwhile; it keeps the forms that the plan takes.

    Raises PlanError with every problem found.
    """
    every = linearise(shapes)
    itemsize = source.stored_dtype.itemsize
    if source.compressed is None:
        untie(shapes, to_untie(recipe, shapes, instances))
    plan = make_plan(recipe, shapes, instances, itemsize=itemsize, compressed=source.compressed)
    touched = {name for row in plan.rows for name in row.touches}
    forms = forms_of(shapes, (*touched, *(row.name for row in plan.given)))
    restore(shapes, set(every).difference(forms))
    output = None if recipe.is_theirs else tied_output(shapes)
    when = "runs, as all of this recipe does," if recipe.is_theirs else "runs first, on the dense model,"
    first = tuple(
        f"{step.where}: {step.name} {when} by llm-compressor's own oneshot; time and memory of it are not in the estimate"
        + (f", and if it unties {output} from the embeddings, both are written" if output is not None else "")
        for step in recipe.steps
    )
    first += tuple(f"{step.where}: {step.name}: {ROTATING}" for step in recipe.steps if step.rotates)
    apart = tuple(
        f"{name} has the weight of the embeddings, and gets one of its own to be quantised: tie_word_embeddings becomes false"
        for name in untied(shapes)
    )
    notes = (*plan.notes, *apart, *first, *_unsettled(recipe, instances), *narrowed(plan, source, shapes))
    return replace(plan, forms=forms, untied=untied(shapes), notes=notes)


def _unsettled(recipe: Recipe, instances: Mapping[str, AnyModifier[Any]]) -> Iterator[str]:
    """A sentence on each entry that plans provisionally."""
    for entry in recipe.modifiers:
        modifier = instances[entry.key]
        if isinstance(modifier, Settles) and modifier.unsettled is not None:
            yield (
                f"{entry.where}: {entry.name}: {modifier.unsettled.key} is not settled: it is planned as if the model needed every "
                "weight alike, and what it needs is measured once its weights are loaded"
            )


def parse_device(name: str) -> torch.device:
    """The device of that name. Raises RecipeError for one that torch does not know or this machine does not have."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        can = "cpu, cuda or cuda:N" if torch.cuda.is_available() else "cpu (`armor doctor` says why there is no GPU)"
        raise RecipeError(f"--device {name}: {str(error).splitlines()[0]}; use {can}") from error
    return device
