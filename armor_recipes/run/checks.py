"""Single checks: what is refused before anything long is computed. `planning` and `preflight` call them and tell all at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from armor_recipes.calibration.text import check_there
from armor_recipes.calibration.tokens import has_length
from armor_recipes.checkpoint.staging import check_destination
from armor_recipes.compute.limit import private_bytes
from armor_recipes.compute.threads import at_once
from armor_recipes.errors import InputError, NumericalError, PlanError, RecipeError
from armor_recipes.integrations.models import ModelSource, kept_in_float32, moved, rounded, written_dtypes
from armor_recipes.integrations.names import origins
from armor_recipes.model.forms import linear_parts
from armor_recipes.modifiers import AnyModifier
from armor_recipes.modifiers.base import Settles
from armor_recipes.modifiers.kinds.quantizer import Quantizer
from armor_recipes.paths import user_path
from armor_recipes.plan import Plan
from armor_recipes.plan.memory import anonymous_bytes
from armor_recipes.recipe import Recipe
from armor_recipes.recipe.schema import memory_bytes
from armor_recipes.run.refusals import Refusals

_SHOWN = 8
#: Tokens below which no sample is advised.
_LEAST_LENGTH = 32


def check_lengths(recipe: Recipe, source: ModelSource) -> None:
    """Windows longer than the model's positions end in an index error (learned positions) or in text it never learned."""
    longest = source.facts.positions
    specs = {f"{entry.where}: {entry.name}: calibration": entry.config.calibration for entry in recipe.modifiers}
    lengths = {where: spec.sequence_length for where, spec in specs.items() if spec is not None and has_length(spec)}
    if recipe.evaluation is not None:
        measures = {name: spec for name, spec in recipe.evaluation.measures.items() if has_length(spec)}
        lengths |= {f"evaluation.{name}": getattr(spec, "sequence_length", 0) for name, spec in measures.items()}
    problems = [
        f"{where}: sequence_length {length} is longer than the {longest} positions of {recipe.model.id}; lower it"
        for where, length in lengths.items()
        if isinstance(longest, int) and length > longest
    ]
    if problems:
        raise PlanError("\n".join(problems))


def check_compressed(recipe: Recipe, source: ModelSource) -> None:
    """What a recipe cannot ask of a model that is compressed already, whatever its modifiers are."""
    if source.compressed is None:
        return
    problems = [f"{step.where}: {step.name}: llm-compressor changes dense models" for step in recipe.steps]
    if recipe.serve is not None and source.compressed.layers:
        problems.append("serve: layers that come packed with the model are not checked for it; leave it out")
    if problems:
        raise PlanError("\n".join(f"{problem}, and {recipe.model.id} is compressed" for problem in problems))


def check_streamed(
    recipe: Recipe,
    source: ModelSource,
    device: torch.device,
    modifiers: Mapping[str, AnyModifier[Any]],
    peak: Callable[[Recipe], int] | None = None,
) -> None:
    """What does not go with `model.memory`: all that holds a whole model, or copies of its weights, as anonymous memory.

    `peak` says how much a recipe takes where there is a plan: of one without `memory`, then, for comparison.
    """
    if recipe.model.memory is None:
        return
    problems = list(_not_streamed(recipe, source, device, modifiers))
    if problems:
        advice = "leave `memory` out"
        if peak is not None:
            without = replace(recipe, model=recipe.model.model_copy(update={"memory": None}))
            advice += f", and the run takes about {mib(peak(without))}"
            sizes = sizes_that_fit(without, peak, memory_bytes(recipe.model.memory))
            advice += f", or with {sizes}" if sizes else f", and no smaller batch of it fits into {recipe.model.memory}"
        raise PlanError("\n".join(f"model.memory {recipe.model.memory}: {text}; {advice}" for text in problems))


def _not_streamed(
    recipe: Recipe, source: ModelSource, device: torch.device, modifiers: Mapping[str, AnyModifier[Any]]
) -> Iterator[str]:
    yield from (f"{step.where}: {step.name} runs in llm-compressor" for step in recipe.steps)
    for entry in recipe.modifiers:
        modifier = modifiers[entry.key]
        if modifier.needs.dense == "model" or modifier.needs.when == "after":
            yield f"{entry.where}: {entry.name} trains through the whole model"
        elif modifier.needs.gradients or (isinstance(modifier, Settles) and modifier.unsettled is not None):
            yield f"{entry.where}: {entry.name} measures gradients of the whole model"
        elif isinstance(modifier, Quantizer):
            yield f"{entry.where}: {entry.name} writes quantised weights"
    if source.compressed is not None:
        yield f"{recipe.model.id} is compressed already"
    elif source.stored() is None or not source.is_safetensors:
        yield f"{recipe.model.id} has no safetensors files on this machine: download or convert it first"
    if device.type != "cpu" or not sys.platform.startswith("linux"):
        yield f"it is for runs on the CPU of a Linux machine, and this is {device.type} on {sys.platform}"


def check_fits(recipe: Recipe, needed: int, peak: Callable[[Recipe], int]) -> None:
    """Raise PlanError where the recipe's memory is less than it needs, with what the process may write to and never touched; `peak`
    says what others need.
    """
    if recipe.model.memory is None:
        return
    memory, untouched = memory_bytes(recipe.model.memory), max(0, private_bytes() - anonymous_bytes())
    needed += untouched
    if needed > memory:
        sizes = sizes_that_fit(recipe, peak, memory - untouched)
        raise PlanError(
            f"model.memory {recipe.model.memory} is too little for this plan on {at_once()} threads: set {mib(needed)} or more"
            + (", or fewer threads (OMP_NUM_THREADS)" if at_once() > 1 else "")
            + (f", or {sizes}" if sizes else "; no smaller batch of the calibration makes it fit")
        )


def sizes_that_fit(recipe: Recipe, peak: Callable[[Recipe], int], memory: int) -> str:
    """The largest batches, by halves, that a recipe's calibration may have to fit into so many bytes, and what it takes with them;
    nothing where none does.
    """
    specs = [entry.config.calibration for entry in recipe.modifiers if entry.config.calibration is not None]
    batch = max((spec.batch_size for spec in specs), default=0)
    length = max((spec.sequence_length for spec in specs), default=0)
    while batch > 1 or length > _LEAST_LENGTH:
        batch, length = (batch // 2, length) if batch > 1 else (1, length // 2)
        taken = peak(_with_sizes(recipe, batch, length))
        if taken <= memory:
            return f"calibration.batch_size {batch} and sequence_length {length}, which take about {mib(taken)}"
    return ""


def _with_sizes(recipe: Recipe, batch: int, length: int) -> Recipe:
    """Calibrated on batches and samples that are no larger."""
    entries = []
    for entry in recipe.modifiers:
        spec = entry.config.calibration
        if spec is not None:
            sizes = {"batch_size": min(spec.batch_size, batch), "sequence_length": min(spec.sequence_length, length)}
            config = entry.config.model_copy(update={"calibration": spec.model_copy(update=sizes)})
            entry = replace(entry, config=config)  # noqa: PLW2901
        entries.append(entry)
    return replace(recipe, modifiers=tuple(entries))


def mib(nbytes: int) -> str:
    """Rounded up, as `model.memory` takes it."""
    return f"{-(-nbytes // 2**20)}MiB"


def narrowed(plan: Plan, source: ModelSource, model: PreTrainedModel) -> tuple[str, ...]:
    """A sentence where packed weights have fewer bits than in the source's files, without anybody having asked for it.

    `model` has the plan's linear forms, and may be on the meta device.
    """
    if source.asked_dtype is not None:
        return ()
    try:
        there = source.stored()
    except InputError:
        return ()  # damaged files are told by preflight
    stored = {} if there is None else there.tensors
    packed = dict.fromkeys(f"{row.name}.weight" for row in plan.modules if row.stored_as == "packed")
    files = origins(model, stored) if stored else {}
    dtypes = [next((stored[there].dtype for there in files[name]), None) for name in packed if name in files]
    wider = [dtype for dtype in dtypes if dtype is not None and dtype.itemsize > source.stored_dtype.itemsize]
    if not wider:
        return ()
    return (
        f"{len(wider)} of the weights are {wider[0]} in the model's files and are packed in {source.stored_dtype}, which its "
        "config.json names; set model.dtype to choose",
    )


def check_output(output: Path, source: ModelSource, recipe: Recipe, *, overwrite: bool) -> None:
    """Raise RecipeError, before anything is computed, where a checkpoint could not or must not be put there at the end."""
    try:
        check_destination(output, overwrite=overwrite, precious=precious_paths(source, recipe))
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise RecipeError(f"output.path {output} is no path that can be written: {error}; choose another") from error
    check_writable(output, "output.path")


def check_places(source: ModelSource, recipe: Recipe) -> None:
    """Raise, with all of them, where data are not there or the output must not be replaced: what a run finds out before it computes
    anything, and a plan alone does not read.
    """
    refused = Refusals()
    with refused.noted():
        check_output(user_path(recipe.output.path), source, recipe, overwrite=True)
    for dataset in recipe.datasets:
        with refused.noted():
            check_there(dataset)
    if refused:
        refused.tell()


def precious_paths(source: ModelSource, recipe: Recipe) -> dict[str, Path]:
    """What a run reads, by what it is: nothing that holds one of these is ever replaced."""
    named: dict[str, Path] = {f"the recipe {file.name}": file for file in recipe.files}
    for dataset in recipe.datasets:
        path = user_path(dataset)
        if "://" not in dataset and not dataset.startswith("builtin:") and path.exists():
            named[f"the dataset {dataset}"] = path
    if recipe.model.teacher is not None and user_path(recipe.model.teacher).exists():
        named["the teacher"] = user_path(recipe.model.teacher)
    if source.folder is not None:
        named["the model that is to be compressed"] = source.folder
    return named


def check_writable(path: Path, what: str) -> None:
    """Raise RecipeError where a file or folder could not be made at `path`, which `what` names in the message."""
    try:
        parent = next(folder for folder in path.resolve().parents if folder.exists())
    except (OSError, ValueError) as error:
        raise RecipeError(f"{what} {path} is no path that can be written: {error}; choose another") from error
    if not parent.is_dir():
        raise RecipeError(f"{what} {path} lies below {parent}, which is not a folder; choose another path")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise RecipeError(f"{what} {path} cannot be written: no permission in {parent}; choose another path")


def check_weights(model: PreTrainedModel, plan: Plan) -> None:
    """Raise NumericalError, naming all of them, for modules that the plan takes and whose numbers are not all finite."""
    broken = {}
    for name in plan.shapes:
        weight = model.get_parameter(f"{name}.weight")
        count = int((~weight.detach().isfinite()).sum())
        if count:
            broken[name] = count
    if broken:
        listed = ", ".join(f"{name} ({count})" for name, count in list(broken.items())[:_SHOWN])
        more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise NumericalError(
            f"the weights of {len(broken)} modules that the recipe takes hold numbers that are not finite: {listed}{more}; mend "
            "the model, or add them to `ignore`"
        )


def check_given(model: PreTrainedModel, shapes: PreTrainedModel, plan: Plan, source: ModelSource) -> None:
    """Raise PlanError where a caller's model is not the one that was planned, or would be written as another."""
    if source.compressed is not None:
        raise PlanError(
            f"a model was given, and {plan.model} is compressed: its factors and integers are read from its folder; leave it out"
        )
    if getattr(model, "_hf_peft_config_loaded", False):
        raise PlanError("the model given has a PEFT adapter on it: merge it first, or load the model without it")
    parts = linear_parts(model)
    for name, shape in plan.shapes.items():
        planned, parameter = parts.get(name, (None, f"{name}.weight"))
        try:
            weight = model.get_parameter(parameter)
        except AttributeError as error:
            raise PlanError(f"the model given has no {name}, which {plan.model} has") from error
        found = planned or tuple(weight.shape)
        if found != shape:
            raise PlanError(f"the model given has {name} {found}, planned was {shape}")
        if weight.is_meta:
            raise PlanError(
                f"the model given has {name} on the meta device (offloaded, or never loaded): load it into memory"
            )
    if not isinstance(model, type(shapes)):
        raise PlanError(
            f"the model given is a {type(model).__name__}, and {plan.model} is a {type(shapes).__name__}: give a model of "
            "the class that is written"
        )
    _refuse_rounded_buffers(model, shapes)
    _refuse_rounded_tables(model, source)
    _refuse_shared(model)


def placed(model: PreTrainedModel, source: ModelSource, device: torch.device) -> PreTrainedModel:
    """A caller's model that was checked, brought to compute dtype and device and rounded as stored, all in place."""
    model.config.return_dict = True  # here outputs are read by name
    there = moved(model, device=device, dtype=source.compute_dtype)
    return rounded(there, written_dtypes(there, source))


def _refuse_shared(model: PreTrainedModel) -> None:
    """Tensors that a caller made one, and the architecture does not: files hold one, and a loader would make up the other."""
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    owners: dict[tuple[object, ...], str] = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or not tensor.numel():
            continue
        key = tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype
        other = owners.setdefault(key, name)
        if other != name and not {name, other} <= tied:
            raise PlanError(
                f"the model given has one tensor for {other} and {name}, which a {type(model).__name__} does not tie: give each "
                "its own"
            )


def _refuse_rounded_buffers(model: PreTrainedModel, shapes: PreTrainedModel) -> None:
    """Buffers that are not saved (rotary frequencies) are made anew by a loader, in full; rounded ones are another model."""
    full = {name: buffer.dtype for name, buffer in shapes.named_buffers()}
    for name in sorted(dict(model.named_buffers()).keys() & full.keys() - model.state_dict().keys()):
        dtype = model.get_buffer(name).dtype
        if dtype.itemsize < full[name].itemsize:
            raise PlanError(
                f"the model given has {name} in {dtype} instead of {full[name]}: it was cast as a whole, which rounds what no "
                "loader rounds; load it with from_pretrained(…, dtype=…) instead of casting it with .to()"
            )


def _refuse_rounded_tables(model: PreTrainedModel, source: ModelSource) -> None:
    """Parameters that are not saved (Marian's sinusoidal positions) are made anew, too, in the dtype that a loader computes in."""
    compute = source.compute_dtype
    kept, saved = kept_in_float32(model, compute), written_dtypes(model, source)
    for name, tensor in model.state_dict().items():
        made = torch.float32 if kept(name) else compute
        if name in saved or not tensor.is_floating_point() or torch.promote_types(tensor.dtype, made) == tensor.dtype:
            continue
        raise PlanError(
            f"the model given has {name} in {tensor.dtype}, which is not saved: a loader makes it anew in {made}, with other "
            f"numbers; load the model with from_pretrained(…, dtype={made}) (what is written keeps the dtypes of the source), or "
            f"set model.compute_dtype to {str(tensor.dtype).removeprefix('torch.')}"
        )
