"""Evaluate a model that is already there: a checkpoint of ours, or any dense model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from armor_recipes.calibration.inputs import InputSet
from armor_recipes.calibration.tokens import build_inputs
from armor_recipes.checkpoint.reader import read_config
from armor_recipes.compute import plain_torch
from armor_recipes.errors import RecipeError
from armor_recipes.evaluation import MEASURES, Evaluation, Measure, Reading, Room
from armor_recipes.integrations.models import (
    ModelSource,
    load_model,
    load_processor,
    load_tokenizer,
    meta_model,
    open_model,
)
from armor_recipes.integrations.transformers import load
from armor_recipes.model.facts import class_numbers
from armor_recipes.model.inputs import model_inputs
from armor_recipes.paths import user_path
from armor_recipes.recipe import load_section
from armor_recipes.recipe.schema import InputsSpec, ModelSpec
from armor_recipes.run.evaluating import taken
from armor_recipes.run.planning import parse_device
from armor_recipes.run.refusals import resource_errors
from armor_recipes.runtime.backends import BACKEND_VARIABLE


def evaluate_model(
    model: str,
    name: str,
    keys: Mapping[str, object],
    *,
    overrides: Sequence[str] = (),
    against: str | None = None,
    device: str = "cpu",
) -> Evaluation:
    """Take one measure of a checkpoint folder of ours or of a dense model, computed in float32 on a CPU.

    Args:
        model: a folder, a hub id, or `builtin:NAME`.
        name: of the measure, as in a recipe's `evaluation`.
        keys: its keys there.
        overrides: `key=value`, laid over them.
        against: the dense model, which is measured before.
        device: where to compute.

    Raises:
        RecipeError: there is no such measure, its keys are wrong, or it needs a dense model to compare with.
        PlanError: it cannot be measured of the model.
        InputError: a model or the data cannot be read.

    """
    known = {measure.name: measure for measure in MEASURES}
    if name not in known:
        raise RecipeError(f"--measure {name}: there is no such measure; give one of {', '.join(known)}")
    measure = known[name]
    spec = load_section(measure.spec_type, ("evaluation", name), keys, overrides=overrides)
    if measure.keeps and against is None:
        raise RecipeError(f"{name} compares a model with the dense one: name that with --against MODEL")
    return _evaluate(model, measure, spec, against, parse_device(device))


@plain_torch()
def _evaluate(
    model: str, measure: type[Measure[Any]], spec: Any, against: str | None, device: torch.device
) -> Evaluation:
    source = _opened(model, device)
    shapes = meta_model(source)
    measure.check(shapes)
    with resource_errors(), tempfile.TemporaryDirectory(prefix="armor-eval-") as folder:
        ready, room = measure.read(spec, _reading(source, shapes)), Room(Path(folder))
        before = None
        if against is not None:
            dense = _loaded(against, device)
            before = taken(partial(ready.before, dense, room), dense)
            del dense  # two models need not be held
        found = _loaded(model, device)
        return Evaluation(measure.name, before, taken(partial(ready.after, found, room), found))


def _reading(source: ModelSource, shapes: PreTrainedModel) -> Reading:
    tokenizer, inputs = load_tokenizer(source), model_inputs(shapes)
    processor = partial(load_processor, source)

    def samples(spec: InputsSpec) -> InputSet:
        return build_inputs(spec, inputs, tokenizer=tokenizer, processor=processor)

    return Reading(tokenizer, inputs, samples, class_numbers(source.config), processor)


def _is_packed(model: str) -> bool:
    return user_path(model).is_dir() and read_config(user_path(model)).get("quantization_config") is not None


def _opened(model: str, device: torch.device) -> ModelSource:
    return open_model(ModelSpec(id=model), device=device, compressed=_is_packed(model))


def _loaded(model: str, device: torch.device) -> PreTrainedModel:
    source = _opened(model, device)
    if not _is_packed(model):
        return load_model(source, device=device)
    # Never `auto`: it may take another way, and give other bits, on every machine and from run to run.
    backend = os.environ.get(BACKEND_VARIABLE) or "folded"
    return load(model, backend=backend, dtype=source.compute_dtype, device=device)
