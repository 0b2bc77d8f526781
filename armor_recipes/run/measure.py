"""Evaluate a model that is already there: a checkpoint of ours, or any dense model."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from armor_recipes.calibration.files import TEXT
from armor_recipes.calibration.inputs import InputSet
from armor_recipes.calibration.text import BUILTIN, CONTINUATIONS, local_path
from armor_recipes.calibration.tokens import build_inputs, has_length
from armor_recipes.checkpoint.files import MANIFEST_FILE
from armor_recipes.checkpoint.header import read_json
from armor_recipes.checkpoint.reader import read_config
from armor_recipes.compute import plain_torch
from armor_recipes.errors import PlanError, RecipeError
from armor_recipes.evaluation import MEASURES, Evaluation, Measure, Measurement, Reading, Room
from armor_recipes.evaluation.fidelity import Fidelity
from armor_recipes.evaluation.multiple_choice import MultipleChoice
from armor_recipes.evaluation.perplexity import PerplexityMeasure
from armor_recipes.evaluation.presets import PRESETS
from armor_recipes.evaluation.speed import Speed, SpeedSpec
from armor_recipes.evaluation.tasks import measure_tasks
from armor_recipes.events import EvaluationProgressed, Observer, PhaseStarted, WorkEstimated, ignore_events
from armor_recipes.integrations.models import (
    ModelSource,
    load_model,
    load_processor,
    load_tokenizer,
    meta_model,
    open_model,
    written_dtypes,
)
from armor_recipes.integrations.transformers import load
from armor_recipes.model.facts import class_numbers
from armor_recipes.model.inputs import model_inputs
from armor_recipes.paths import user_path
from armor_recipes.recipe import load_section
from armor_recipes.recipe.schema import DType, InputsSpec, ModelSpec, Strict, datasets_of
from armor_recipes.report.machine import machine_class
from armor_recipes.report.manifest import state_hash
from armor_recipes.report.saved import Saved, is_saved, read_saved
from armor_recipes.run.evaluating import taken
from armor_recipes.run.planning import parse_device
from armor_recipes.run.refusals import resource_errors
from armor_recipes.runtime.backends import BACKEND_VARIABLE

#: Of these a figure is of tokens, or of texts as tokens: two models must have the same.
_OF_TOKENS = (PerplexityMeasure, MultipleChoice, Fidelity)


def evaluate_model(
    model: str,
    name: str,
    keys: Mapping[str, object],
    *,
    preset: str | None = None,
    flags: Mapping[str, object] | None = None,
    overrides: Sequence[str] = (),
    against: str | None = None,
    device: str = "cpu",
    observer: Observer = ignore_events,
) -> Evaluation:
    """Take one measure of a checkpoint folder of ours or of a dense model, computed in float32 on a CPU.

    Args:
        model: a folder, a hub id, or `builtin:NAME`.
        name: of the measure, as in a recipe's `evaluation`; or `speed`, which is taken in the stored dtype.
        keys: its keys there.
        preset: of `PRESETS`, whose keys lie under `keys`.
        flags: keys laid over them, which messages call `--key`.
        overrides: `key=value`, laid over both.
        against: the dense model, which is measured before; or a file `NAME.json` with what was measured of it (`read_saved`).
        device: where to compute.
        observer: is told how far it has come.

    Raises:
        RecipeError: there is no such measure, its keys are wrong, or it needs a dense model to compare with.
        PlanError: it cannot be measured of the model, or the two cannot be compared.
        InputError: a model or the data cannot be read.

    """
    measures: tuple[type[Measure[Any]], ...] = (*MEASURES, Speed)
    known = {measure.name: measure for measure in measures}
    if name not in known:
        raise RecipeError(f"--measure {name}: there is no such measure; give one of {', '.join(known)}")
    if preset is not None and name != PerplexityMeasure.name:
        raise RecipeError(f"--preset {preset} is of perplexity, and does not go with --measure {name}; leave one out")
    measure = known[name]
    keys = {**({} if preset is None else PRESETS[preset]), **keys}
    spec = load_section(measure.spec_type, ("evaluation", name), keys, flags=flags, overrides=overrides)
    _check_flags(flags or {}, spec)
    if measure.keeps and against is None:
        raise RecipeError(f"{name} compares a model with the dense one: name that with --against MODEL")
    if measure.keeps and against is not None and is_saved(against):
        raise RecipeError(f"{name} compares outputs, and {against} holds figures alone: name the dense model itself")
    return _evaluate(model, measure, spec, against, parse_device(device), preset=preset, observer=observer)


def _check_flags(flags: Mapping[str, object], spec: Strict) -> None:
    """Raise RecipeError for a flag that says where to look in a dataset that has no such place."""
    for dataset in datasets_of(spec):
        inside = dataset.startswith(BUILTIN)
        path = None if inside else local_path(dataset)
        if "split" in flags and (inside or path is not None):
            raise RecipeError(f"--split {flags['split']}: {dataset} is no hub dataset and has no splits; leave it out")
        plain = dataset != CONTINUATIONS if inside else path is not None and path.suffix.lower() in TEXT
        if "text_column" in flags and plain:
            raise RecipeError(
                f"--text-column {flags['text_column']}: {dataset} is plain text and has no columns; leave it out"
            )


@plain_torch()
def evaluate_tasks(
    model: str,
    tasks: Sequence[str],
    *,
    include: Path | None = None,
    limit: int | None = None,
    against: str | None = None,
    device: str = "cpu",
) -> Evaluation:
    """Have lm-eval measure tasks of a model, and of the one to compare with before. Arguments and errors as `measure_tasks`."""
    on = parse_device(device)
    keys = {"tasks": list(tasks), "include": None if include is None else str(include), "limit": limit}
    saved = _saved(against, "tasks", keys)

    def take(name: str) -> Measurement:
        source = _opened(name, on)
        return measure_tasks(_loaded(name, source, on), load_tokenizer(source), tasks, include=include, limit=limit)

    with resource_errors():
        before = None if against is None else take(against) if saved is None else saved.after
        after = take(model)
        if saved is not None:
            saved.check_data(after.sha256)
        return Evaluation("tasks", before, after, keys)


def _saved(against: str | None, measure: str, keys: Mapping[str, Any]) -> Saved | None:
    """What was measured before of the model to compare with, where a file of that is named. Raises InputError and PlanError."""
    if against is None or not is_saved(against):
        return None
    saved = read_saved(user_path(against))
    saved.check(measure, keys)
    return saved


@plain_torch()
def _evaluate(
    model: str,
    measure: type[Measure[Any]],
    spec: Strict,
    against: str | None,
    device: torch.device,
    *,
    preset: str | None,
    observer: Observer,
) -> Evaluation:
    compute = spec.compute_dtype if isinstance(spec, SpeedSpec) else None
    keys = {**spec.model_dump(mode="json"), "preset": preset}
    saved = _saved(against, measure.name, keys)
    if saved is not None and measure is Speed:
        _check_machine(saved, device)
    source, shapes = _checked(model, measure, spec, device, compute)
    other = None if against is None or saved is not None else _checked(against, measure, spec, device, compute)
    with resource_errors(), tempfile.TemporaryDirectory(prefix="armor-eval-") as folder:
        ready = measure.read(spec, _reading(source, shapes))
        room = Room(Path(folder), lambda done, total: observer(EvaluationProgressed(done, total, ready.name)))
        phases = ["evaluate"] if other is None else ["evaluate before", "evaluate after"]
        observer(WorkEstimated(dict.fromkeys(phases, 1.0), 0.0, {ready.name: 1}))
        before = None
        if saved is not None:
            saved.check_data(ready.sha256)
            _check_origin(model, str(saved.file), saved.origin)
            before = saved.after
        elif against is not None and other is not None:
            _check_tokens(ready, spec, other, (model, against))
            observer(PhaseStarted(phases[0]))
            dense = _loaded(against, other[0], device, timed=measure is Speed)
            if preset is not None:
                _check_origin(model, against, _dense_hash(against, other[0], dense))
            before = taken(partial(ready.before, dense, room), dense)
            del dense  # two models need not be held
        observer(PhaseStarted(phases[-1]))
        found = _loaded(model, source, device, timed=measure is Speed)
        origin = None if preset is None else _dense_hash(model, source, found)
        after = taken(partial(ready.after, found, room), found)
        if saved is not None:
            saved.check_rows(after)
        return Evaluation(measure.name, before, after, keys, origin)


def _checked(
    model: str, measure: type[Measure[Any]], spec: Strict, device: torch.device, compute: DType | None
) -> tuple[ModelSource, PreTrainedModel]:
    """A model's configuration and its shapes. Raises PlanError, with its name, where the measure cannot be taken of it."""
    source = _opened(model, device, compute)
    shapes = meta_model(source)
    try:
        measure.check(shapes)
    except PlanError as error:
        raise PlanError(f"{model}: {error}") from error
    _check_positions(spec, model, source)
    return source, shapes


def _check_machine(saved: Saved, device: torch.device) -> None:
    """Raise PlanError where times were taken on another machine class or with other threads."""
    here = {**machine_class(str(device)), "threads": torch.get_num_threads()}
    there = {**saved.machine, "threads": getattr(saved.after, "details", {}).get("threads")}
    differ = [name for name in sorted({*here, *there}) if here.get(name) != there.get(name)]
    if differ:
        told = ", ".join(f"{name} {there.get(name)} and not {here.get(name)}" for name in differ)
        raise PlanError(f"{saved.file} was timed with {told}, so that speeds do not compare: measure it anew here")


def _check_positions(spec: Any, name: str, source: ModelSource) -> None:
    """Raise PlanError where windows are longer than the context of a model: it never learned to read such."""
    longest = source.facts.positions
    if longest is None:
        return
    if isinstance(spec, SpeedSpec) and spec.prompt_tokens + spec.new_tokens > longest:
        raise PlanError(
            f"prompt_tokens {spec.prompt_tokens} and new_tokens {spec.new_tokens} are more than the {longest} positions of {name}; "
            "lower them with --set, for all models that are compared"
        )
    if has_length(spec) and spec.sequence_length > longest:
        raise PlanError(
            f"sequence_length {spec.sequence_length} is longer than the {longest} positions of {name}; lower it with "
            "--sequence-length, for all models that are compared"
        )


def _check_tokens(
    ready: Measure[Any], spec: Any, other: tuple[ModelSource, PreTrainedModel], names: tuple[str, str]
) -> None:
    """Raise PlanError where the tokenizer of the other model, the second by name, writes the text in other tokens."""
    if not isinstance(ready, _OF_TOKENS) or load_tokenizer(other[0]) is None:
        return
    if type(ready).read(spec, _reading(*other)).sha256 != ready.sha256:
        advice = "measure each without --against"
        if ready.keeps:
            advice = "name the dense model that the other was made of"
        elif ready.name == "perplexity":
            advice += ", and compare byte_perplexity"
        raise PlanError(
            f"the tokenizers of {names[0]} and {names[1]} write the text in different tokens, so that figures do not compare: "
            f"{advice}"
        )


def _check_origin(model: str, against: str, theirs: str | None) -> None:
    """Raise PlanError where the model's manifest names another dense model than the one it is compared with, or came from."""
    own = _origin(model)
    if None not in (own, theirs) and own != theirs:
        raise PlanError(
            f"the manifest of {model} says that it was made of another dense model than {against} (sha256 {str(own)[:12]} and "
            f"{str(theirs)[:12]}), so that the two do not compare: give the one that it was made of, or leave --against out"
        )


def _dense_hash(name: str, source: ModelSource, model: PreTrainedModel) -> str | None:
    """The hash of the dense weights that a model has, or was made of; None where a compressed folder does not say."""
    own = _origin(name)
    if own is None and not _is_packed(name):
        return state_hash(model, written_dtypes(model, source), source.stored_dtype)
    return own


def _origin(model: str) -> str | None:
    """The hash of the dense weights that a checkpoint was made of; None where there is no manifest that says so."""
    file = user_path(model) / MANIFEST_FILE
    if not file.is_file():
        return None
    found = read_json(file).get("model")
    sha256 = found.get("sha256") if isinstance(found, dict) else None
    return sha256 if isinstance(sha256, str) else None


def _reading(source: ModelSource, shapes: PreTrainedModel) -> Reading:
    tokenizer, inputs = load_tokenizer(source), model_inputs(shapes)
    processor = partial(load_processor, source)

    def samples(spec: InputsSpec) -> InputSet:
        return build_inputs(spec, inputs, tokenizer=tokenizer, processor=processor)

    return Reading(tokenizer, inputs, samples, class_numbers(source.config), processor)


def _is_packed(model: str) -> bool:
    return user_path(model).is_dir() and read_config(user_path(model)).get("quantization_config") is not None


def _opened(model: str, device: torch.device, compute: DType | None = None) -> ModelSource:
    """The model's configuration; it is computed in float32 on a CPU, or in `compute`, of which `auto` is the stored dtype."""
    spec = ModelSpec(id=model, compute_dtype=compute or "auto")
    source = open_model(spec, device=device, compressed=_is_packed(model))
    return replace(source, compute_dtype=source.stored_dtype) if compute == "auto" else source


def _loaded(model: str, source: ModelSource, device: torch.device, *, timed: bool = False) -> PreTrainedModel:
    if not _is_packed(model):
        return load_model(source, device=device)
    # `auto` may take another way, and give other bits, on every machine and from run to run: for times alone.
    backend = os.environ.get(BACKEND_VARIABLE) or ("auto" if timed else "folded")
    return load(model, backend=backend, dtype=source.compute_dtype, device=device)
