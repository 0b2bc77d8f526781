"""Carry a recipe out from end to end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from errno import EDQUOT, ENOSPC
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from armor_recipes.calibration.tokens import TokenSet, build_tokens
from armor_recipes.checkpoint.companions import PROCESSORS, TOKENIZERS, Companions, companions
from armor_recipes.checkpoint.files import MANIFEST_FILE, read_config
from armor_recipes.checkpoint.staging import files_below, kept_aside, staged
from armor_recipes.checkpoint.stored import StoredTensors
from armor_recipes.checkpoint.writer import carry_over, tensor_hashes, write_checkpoint
from armor_recipes.compute import is_out_of_memory, plain_torch
from armor_recipes.errors import RecipeError, ResourceError
from armor_recipes.evaluation.perplexity import Perplexity, evaluate
from armor_recipes.events import EvaluationProgressed, Observer, ignore_events
from armor_recipes.integrations.models import (
    ModelSource,
    attention_of,
    fetch_files,
    hub_id,
    load_model,
    load_tokenizer,
    meta_model,
    open_model,
    written_dtypes,
)
from armor_recipes.integrations.transformers import check_registered
from armor_recipes.modifiers import AnyModifier, config_types, modifiers
from armor_recipes.paths import user_path
from armor_recipes.plan import Plan, RunEstimate, estimate_run, make_plan
from armor_recipes.recipe import Recipe, load_recipe, load_recipe_mapping
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.report.card import model_card
from armor_recipes.report.licence import Licence, base_licence
from armor_recipes.report.manifest import Facts, build_manifest, calibration_rows, state_hash
from armor_recipes.report.measure import Stopwatch
from armor_recipes.run.preflight import (
    check_lengths,
    check_names,
    check_output,
    check_packable,
    check_renamed,
    check_weights,
    given_model,
    narrowed,
    precious_paths,
)
from armor_recipes.run.result import Result
from armor_recipes.run.verify import verify_reloaded
from armor_recipes.session import Session
from armor_recipes.solver.sweep import sweep_form

RecipeLike = Recipe | str | Path | Mapping[str, object] | Sequence[str | Path]


@dataclass(frozen=True, slots=True)
class Job:
    """A recipe that was checked and planned on a model's shapes; nothing has been read but configurations."""

    recipe: Recipe
    source: ModelSource
    modifiers: Mapping[str, AnyModifier[Any]]
    plan: Plan
    estimate: RunEstimate
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
        observer: is called with each event of `armor_recipes.events`.

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


@plain_torch()
def prepare(recipe: Recipe, *, device: str = "cpu") -> Job:
    """Plan a recipe on the meta device. Raises PlanError with every problem found, InputError where the model has no config."""
    target = parse_device(device)
    source = open_model(recipe.model, device=target)
    check_lengths(recipe, source)
    known = modifiers()
    instances = {entry.key: known[entry.kind](entry.config) for entry in recipe.modifiers}
    shapes = meta_model(source)
    check_packable(recipe, shapes)
    if recipe.output.format == "compressed-tensors":
        check_registered()
    plan = make_plan(recipe, shapes, instances, itemsize=source.stored_dtype.itemsize)
    check_names(recipe, plan, shapes)
    estimate = estimate_run(plan, recipe, shapes, instances)
    return Job(recipe, source, instances, replace(plan, notes=narrowed(plan, source)), estimate, target)


def parse_device(name: str) -> torch.device:
    """The device of that name. Raises RecipeError for one that torch does not know or this machine does not have."""
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise RecipeError(f"--device {name}: {str(error).splitlines()[0]}; use cpu, cuda or cuda:N") from error
    return device


@plain_torch()
def execute(
    job: Job,
    model: PreTrainedModel | None = None,
    *,
    tokenizer: Any | None = None,
    overwrite: bool = False,
    observer: Observer = ignore_events,
) -> Result:
    """Carry out a prepared job: load, calibrate, evaluate, compress, evaluate again, write, verify, commit."""
    output = user_path(job.recipe.output.path)
    check_output(output, job.source, job.recipe, overwrite=overwrite)
    watch = Stopwatch(observer)
    with resource_errors():
        run = _Run.start(job, model, tokenizer, watch)
        before = run.evaluate("evaluate before")
        source_hash = state_hash(run.model, run.dtypes, job.source.stored_dtype)
        session = run.compress()
        after = run.evaluate("evaluate after")
        facts = Facts(
            recipe=job.recipe,
            plan=job.plan,
            source_sha256=source_hash,
            stored_dtype=job.source.stored_dtype,
            compute_dtype=job.source.compute_dtype,
            device=job.device.type,
            attention=attention_of(run.model),
            tokens=run.tokens,
            modules=session.results,
            results=session.state.results,
            before=before,
            after=after,
        )
        watch.phase("save")
        with staged(output, overwrite=overwrite, precious=precious_paths(job.source, job.recipe)) as folder:
            run.write(folder, facts)
            with kept_aside(folder, output):
                watch.phase("verify")
                verify_reloaded(folder, run.model, packed=run.packed, seed_tokens=run.probe_tokens())
                report = run.report(folder, facts)
    return Result(
        plan=job.plan,
        output=output,
        estimate=job.estimate,
        modules=session.results,
        results=session.state.results,
        perplexity_before=before,
        perplexity_after=after,
        report=report,
    )


def _companions(source: ModelSource, *, with_tokenizer: bool) -> Companions:
    """Files beside the base model's weights that come along; those of its tokenizer only where it is that which is saved."""
    patterns = (*PROCESSORS, *(TOKENIZERS if with_tokenizer else ()))
    fetch_files(source, patterns)
    return Companions({}) if source.files is None else companions(source.files, patterns)


@dataclass(slots=True)
class _Run:
    """What is in memory while a job runs."""

    job: Job
    model: PreTrainedModel
    tokenizer: Any | None
    tokens: dict[CalibrationSpec, TokenSet]
    watch: Stopwatch
    dtypes: dict[str, torch.dtype]
    licence: Licence
    companions: Companions
    given: bool
    """Whether the model came in memory, so that the source's files say nothing of its tensors."""
    carried: tuple[str, ...] = ()
    """Tensors of the source's files that no module of the model holds, written as they are."""

    @classmethod
    def start(cls, job: Job, model: PreTrainedModel | None, tokenizer: Any | None, watch: Stopwatch) -> _Run:
        """Load what is not given, and build the calibration windows before the first long computation."""
        watch.phase("load")
        licence = base_licence(job.source)
        beside = _companions(job.source, with_tokenizer=tokenizer is None)
        tokenizer = load_tokenizer(job.source) if tokenizer is None else tokenizer
        watch.phase("tokenize")
        vocabulary = job.source.vocab_size
        specs = dict.fromkeys(e.config.calibration for e in job.recipe.modifiers if e.config.calibration is not None)
        tokens = {spec: build_tokens(spec, tokenizer=tokenizer, vocab_size=vocabulary) for spec in specs}
        watch.phase("load weights")
        given = model is not None
        if model is None:
            loaded = load_model(job.source, device=job.device)
            check_renamed(loaded, job.source)
        else:
            loaded = given_model(model, job.plan, job.recipe, job.source, job.device)
        check_weights(loaded, job.plan)
        dtypes = written_dtypes(loaded, job.source)
        return cls(job, loaded, tokenizer, tokens, watch, dtypes, licence, beside, given)

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
        base = self.job.source.files
        files = {
            **self.companions.files,
            **self.licence.files,
            "README.md": model_card(facts, self.licence, base_model=hub_id(self.job.source)).encode(),
            "recipe.yaml": facts.recipe.resolved_yaml().encode(),
        }
        write_checkpoint(
            self.model,
            layers,
            folder,
            tokenizer=self.tokenizer,
            dtype=self.job.source.stored_dtype,
            dtypes=self.dtypes,
            files=files,
            base_config={} if base is None else read_config(base),
        )
        self.carried = () if base is None or self.given else carry_over(folder, StoredTensors(base))
        manifest = {**build_manifest(facts, tensor_hashes(folder)), "carried_over": list(self.carried)}
        manifest["files"] = sorted({*files_below(folder), MANIFEST_FILE, "report.json"})
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")

    def report(self, folder: Path, facts: Facts) -> dict[str, Any]:
        """Write what is no function of the inputs; returns it."""
        job = self.job
        report = {
            **self.watch.report(folder, source=job.source.folder, estimate=job.estimate, modules=facts.modules),
            "seconds_by_refinement": {f"{r.modifier} {r.unit}": round(r.seconds, 3) for r in facts.refinements},
            "calibration": calibration_rows(facts),
            "sweep": sweep_form(job.device.type),
            "left_out": list(self.companions.left_out),
            "carried_over": list(self.carried),
        }
        (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return report

    def probe_tokens(self) -> torch.Tensor:
        """A calibration window, or the first token ids, to compare logits on: `(1, L)`."""
        for tokens in self.tokens.values():
            return tokens.ids[:1]
        return torch.arange(min(32, self.job.source.vocab_size))[None]


@contextmanager
def resource_errors() -> Iterator[None]:
    """Out of memory or disk, as errors of our own."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
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


__all__ = ["Job", "apply", "builtin_recipe_dir", "execute", "prepare", "read_recipe"]
