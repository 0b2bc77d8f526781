"""Carry a recipe out from end to end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from armor_recipes.calibration.tokens import TokenSet, build_tokens
from armor_recipes.checkpoint.staging import check_destination, staged
from armor_recipes.checkpoint.writer import tensor_hashes, write_checkpoint
from armor_recipes.errors import PlanError, RecipeError, ResourceError
from armor_recipes.evaluation.perplexity import Perplexity, evaluate
from armor_recipes.integrations.models import (
    ModelSource,
    load_model,
    load_tokenizer,
    meta_model,
    moved,
    open_model,
    rounded,
)
from armor_recipes.modifiers import AnyModifier, config_types, modifiers
from armor_recipes.recipe import Recipe, load_recipe, load_recipe_mapping
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.report.card import model_card
from armor_recipes.report.licence import base_licence
from armor_recipes.report.manifest import Facts, build_manifest, calibration_rows, state_hash
from armor_recipes.report.measure import Stopwatch
from armor_recipes.run.result import Result
from armor_recipes.run.verify import verify_reloaded
from armor_recipes.session import Observer, Plan, Session, make_plan
from armor_recipes.session.events import EvaluationProgressed, ignore_events
from armor_recipes.solver.sweep import sweep_form

#: What torch says when a CPU allocation fails; it raises a plain RuntimeError.
_CPU_OUT_OF_MEMORY = "DefaultCPUAllocator"

RecipeLike = Recipe | str | Path | Mapping[str, object] | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe that was checked and planned on a model's shapes; nothing has been read but configurations."""

    recipe: Recipe
    source: ModelSource
    modifiers: Mapping[str, AnyModifier[Any]]
    plan: Plan
    device: torch.device


def apply(
    recipe: RecipeLike,
    model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: Any | None = None,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    observer: Observer = ignore_events,
) -> Result:
    """Run a recipe and write its checkpoint: what `armor-apply` does.

    Args:
        recipe: a path, a built-in recipe's name, several of them, a mapping with a recipe's keys, or a `Recipe`.
        model: a hub id, folder or `builtin:` name that replaces the recipe's; or a model in memory, which is compressed in
            place (the recipe's `model` then names where its configuration and tokenizer come from).
        tokenizer: replaces the one that comes with the model.
        overrides: `a.b.c=value`, as `--set`.
        output: replaces `output.path`.
        overwrite: replace an existing checkpoint at the output path.
        device: where to compute.
        observer: is called with each event of `armor_recipes.session.events`.

    Raises:
        ArmorError: one of its subclasses; nothing half-written is left behind.
    """
    named = str(model) if isinstance(model, (str, Path)) else None
    loaded = None if isinstance(model, (str, Path)) else model
    if loaded is not None and not isinstance(loaded, PreTrainedModel):
        raise RecipeError(
            f"model is a {type(loaded).__name__}: give a hub id, a folder, builtin:NAME or a PreTrainedModel"
        )
    resolved = read_recipe(recipe, overrides=overrides, model=named, output=None if output is None else str(output))
    return execute(
        prepare(resolved, device=device), loaded, tokenizer=tokenizer, overwrite=overwrite, observer=observer
    )


def read_recipe(
    recipe: RecipeLike, *, overrides: Sequence[str] = (), model: str | None = None, output: str | None = None
) -> Recipe:
    """Load and check a recipe from any of the forms that `apply` takes. Raises RecipeError."""
    if isinstance(recipe, Recipe):
        if overrides or model is not None or output is not None:
            raise RecipeError(
                "overrides, model and output go with a recipe's path or mapping, not with a loaded Recipe"
            )
        return recipe
    options: dict[str, Any] = {
        "overrides": overrides,
        "registry": config_types(),
        "builtin_dir": builtin_recipe_dir(),
        "model": model,
        "output": output,
    }
    if isinstance(recipe, Mapping):
        return load_recipe_mapping(recipe, **options)
    return load_recipe([recipe] if isinstance(recipe, (str, Path)) else recipe, **options)


def builtin_recipe_dir() -> Path:
    """The folder of the recipes that come with the package."""
    return Path(__file__).parents[1] / "recipes"


def prepare(recipe: Recipe, *, device: str = "cpu") -> Job:
    """Plan a recipe on the meta device. Raises PlanError with every problem found, InputError where the model has no config."""
    target = parse_device(device)
    source = open_model(recipe.model, device=target)
    _check_lengths(recipe, source)
    known = modifiers()
    instances = {entry.key: known[entry.kind](entry.config) for entry in recipe.modifiers}
    shapes = meta_model(source)
    _check_packable(recipe, shapes)
    plan = make_plan(recipe, shapes, instances, itemsize=source.stored_dtype.itemsize)
    return Job(recipe, source, instances, plan, target)


def _check_packable(recipe: Recipe, model: PreTrainedModel) -> None:
    """Fused expert weights are written under other names than the model's own, which the packed layout cannot follow."""
    fused = [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    if fused and recipe.output.format == "compressed-tensors":
        raise PlanError(
            f"{recipe.model.id} has {len(fused)} fused expert weights ({fused[0]}, …), which output.format compressed-tensors "
            "does not support yet: set output.format: dense"
        )


def _check_lengths(recipe: Recipe, source: ModelSource) -> None:
    """Windows longer than the model's positions end in an index error (learned positions) or in text it never learned."""
    longest = getattr(source.config.get_text_config(), "max_position_embeddings", None)
    specs = {f"{entry.where}: {entry.name}: calibration": entry.config.calibration for entry in recipe.modifiers}
    lengths = {where: spec.sequence_length for where, spec in specs.items() if spec is not None}
    if recipe.evaluation is not None:
        lengths["evaluation.perplexity"] = recipe.evaluation.perplexity.sequence_length
    problems = [
        f"{where}: sequence_length {length} is longer than the {longest} positions of {recipe.model.id}; lower it"
        for where, length in lengths.items()
        if isinstance(longest, int) and length > longest
    ]
    if problems:
        raise PlanError("\n".join(problems))


def parse_device(name: str) -> torch.device:
    """The device of that name. Raises RecipeError for one that torch does not know or this machine does not have."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"--device {name}: {str(error).splitlines()[0]}; use cpu, cuda or cuda:N") from error
    return device


def execute(
    job: Job,
    model: PreTrainedModel | None = None,
    *,
    tokenizer: Any | None = None,
    overwrite: bool = False,
    observer: Observer = ignore_events,
) -> Result:
    """Carry out a prepared job: load, calibrate, evaluate, compress, evaluate again, write, verify, commit."""
    output = Path(job.recipe.output.path)
    _check_output(output, job.source.folder, overwrite=overwrite)
    watch = Stopwatch(observer)
    with resource_errors():
        run = _Run.start(job, model, tokenizer, watch)
        before = run.evaluate("evaluate before")
        source_hash = state_hash(run.model, job.source.stored_dtype)
        session = run.compress()
        after = run.evaluate("evaluate after")
        facts = Facts(
            recipe=job.recipe,
            plan=job.plan,
            source_sha256=source_hash,
            stored_dtype=job.source.stored_dtype,
            compute_dtype=job.source.compute_dtype,
            device=job.device.type,
            tokens=run.tokens,
            modules=session.results,
            refinements=session.refinements,
            rearrangements=session.rearrangements,
            before=before,
            after=after,
        )
        watch.phase("save")
        with staged(output, overwrite=overwrite) as folder:
            run.write(folder, facts)
            watch.phase("verify")
            verify_reloaded(folder, run.model, packed=run.packed, seed_tokens=run.probe_tokens())
            report = {
                **watch.report(folder, source=job.source.folder, plan=job.plan, modules=session.results),
                "seconds_by_refinement": {f"{r.modifier} {r.unit}": round(r.seconds, 3) for r in session.refinements},
                "calibration": calibration_rows(facts),
                "sweep": sweep_form(job.device.type),
            }
            (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return Result(
        plan=job.plan,
        output=output,
        modules=session.results,
        rearrangements=session.rearrangements,
        refinements=session.refinements,
        perplexity_before=before,
        perplexity_after=after,
        report=report,
    )


def _check_output(output: Path, source: Path | None, *, overwrite: bool) -> None:
    """Raise RecipeError, before anything is computed, where a checkpoint could not be put there at the end."""
    try:
        check_destination(output, overwrite=overwrite)
    except (OSError, ValueError) as error:  # a name that is too long, or holds a NUL
        raise RecipeError(f"output.path {output} is no path that can be written: {error}; choose another") from error
    check_writable(output, "output.path")
    if source is not None and source.resolve().is_relative_to(output.resolve()):
        raise RecipeError(f"output.path {output} is or holds the model that is to be compressed; choose another path")


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


@dataclass(slots=True)
class _Run:
    """What is in memory while a job runs."""

    job: Job
    model: PreTrainedModel
    tokenizer: Any | None
    tokens: dict[CalibrationSpec, TokenSet]
    watch: Stopwatch

    @classmethod
    def start(cls, job: Job, model: PreTrainedModel | None, tokenizer: Any | None, watch: Stopwatch) -> _Run:
        """Load what is not given, and build the calibration windows before the first long computation."""
        watch.phase("load")
        tokenizer = load_tokenizer(job.source) if tokenizer is None else tokenizer
        watch.phase("tokenize")
        vocabulary = job.source.config.get_text_config().vocab_size
        specs = dict.fromkeys(e.config.calibration for e in job.recipe.modifiers if e.config.calibration is not None)
        tokens = {spec: build_tokens(spec, tokenizer=tokenizer, vocab_size=vocabulary) for spec in specs}
        watch.phase("load weights")
        loaded = load_model(job.source, device=job.device) if model is None else _given(model, job)
        return cls(job, loaded, tokenizer, tokens, watch)

    @property
    def packed(self) -> bool:
        """Whether factors are kept packed; else they are folded into plain weights."""
        return self.job.recipe.output.format == "compressed-tensors"

    def evaluate(self, phase: str) -> Perplexity | None:
        """Perplexity on the recipe's held-out text, or None where it names none."""
        wanted = self.job.recipe.evaluation
        if wanted is None:
            return None
        self.watch.phase(phase)

        def progress(done: int, total: int) -> None:
            self.watch.observer(EvaluationProgressed(done, total))

        return evaluate(self.model, wanted.perplexity, self.tokenizer, on_progress=progress)

    def compress(self) -> Session:
        """Run a session to its end; it holds the results."""
        job = self.job
        self.watch.phase("compress")
        with Session(
            job.recipe,
            job.plan,
            self.model,
            job.modifiers,
            self.tokens,
            stored_dtype=job.source.stored_dtype,
            keep_packed=self.packed,
            observer=self.watch.observer,
        ) as session:
            session.run()
        return session

    def write(self, folder: Path, facts: Facts) -> None:
        """Write everything but the report into an empty folder; the manifest comes last, since it hashes the tensors."""
        layers = {name: result.packed for name, result in facts.modules.items() if result.packed is not None}
        licence = base_licence(self.job.source)
        files = {
            "README.md": model_card(facts, licence).encode(),
            "recipe.yaml": facts.recipe.resolved_yaml().encode(),
            **licence.files,
        }
        write_checkpoint(
            self.model,
            layers,
            folder,
            tokenizer=self.tokenizer,
            dtype=self.job.source.stored_dtype,
            files=files,
        )
        manifest = build_manifest(facts, tensor_hashes(folder))
        (folder / "armor_manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    def probe_tokens(self) -> torch.Tensor:
        """A calibration window, or the first token ids, to compare logits on: `(1, L)`."""
        for tokens in self.tokens.values():
            return tokens.ids[:1]
        return torch.arange(min(32, self.job.source.config.get_text_config().vocab_size))[None]


def _given(model: PreTrainedModel, job: Job) -> PreTrainedModel:
    """A caller's model, checked against the plan, brought to compute dtype and device and rounded as stored, all in place."""
    for name, shape in job.plan.shapes.items():
        try:
            found = tuple(model.get_parameter(f"{name}.weight").shape)
        except AttributeError as error:
            raise PlanError(f"the model given has no {name}, which {job.recipe.model.id} has") from error
        if found != shape:
            raise PlanError(f"the model given has {name} {found}, planned was {shape}")
    _refuse_rounded_buffers(model, job)
    return rounded(moved(model, device=job.device, dtype=job.source.compute_dtype), job.source.stored_dtype)


def _refuse_rounded_buffers(model: PreTrainedModel, job: Job) -> None:
    """Buffers that are not saved (rotary frequencies) are made anew by a loader, in full; rounded ones are another model."""
    full = {name: buffer.dtype for name, buffer in meta_model(job.source).named_buffers()}
    for name in sorted(dict(model.named_buffers()).keys() & full.keys() - model.state_dict().keys()):
        dtype = model.get_buffer(name).dtype
        if dtype.itemsize < full[name].itemsize:
            raise PlanError(
                f"the model given has {name} in {dtype} instead of {full[name]}: it was cast as a whole, which rounds what no "
                "loader rounds; load it with from_pretrained(…, dtype=…) instead of casting it with .to()"
            )


@contextmanager
def resource_errors() -> Iterator[None]:
    """Out of memory or disk, as errors of our own."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and _CPU_OUT_OF_MEMORY not in str(error):
            raise
        raise ResourceError(
            f"out of memory: {error}; lower calibration samples or batch_size, or use a larger machine"
        ) from error
    except OSError as error:
        if error.errno in (ENOSPC, EDQUOT):
            raise ResourceError(
                f"no space left on the disk of {error.filename or 'the output'}; free some and run again"
            ) from error
        raise


__all__ = ["Job", "apply", "builtin_recipe_dir", "check_writable", "execute", "prepare", "read_recipe"]
