"""Carry a recipe out from end to end."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from armor_recipes.calibration.inputs import Batch, arguments
from armor_recipes.calibration.random_inputs import draw
from armor_recipes.checkpoint.companions import Companions
from armor_recipes.checkpoint.config import version_of
from armor_recipes.checkpoint.files import MANIFEST_FILE, give_usual_permissions, read_config, read_header, write_whole
from armor_recipes.checkpoint.lock import locked
from armor_recipes.checkpoint.staging import REPORT_FILES, files_below, kept_aside, recover, staged, tried
from armor_recipes.checkpoint.writer import carry_over, file_hashes, tensor_hashes, write_beside, write_checkpoint
from armor_recipes.compute import plain_torch
from armor_recipes.compute.limit import limited
from armor_recipes.compute.ranks import agree, first
from armor_recipes.compute.scratch import Scratch
from armor_recipes.compute.threads import side_by_side
from armor_recipes.errors import InputError, RecipeError, ResourceError
from armor_recipes.events import Observer, PhaseStarted, ignore_events
from armor_recipes.exhaustion import what_ran_out
from armor_recipes.integrations.models import attention_of, load_model, load_teacher, rounded, written_dtypes
from armor_recipes.integrations.names import left_behind
from armor_recipes.integrations.oneshot.step import Step, run_step, run_whole
from armor_recipes.model.forms import linearise, restore
from armor_recipes.model.inputs import random_inputs
from armor_recipes.model.ties import untie
from armor_recipes.modifiers import config_types
from armor_recipes.modifiers.kinds.changes import Changes
from armor_recipes.paths import user_path
from armor_recipes.recipe import Recipe, load_recipe, load_recipe_mapping
from armor_recipes.recipe.schema import memory_bytes
from armor_recipes.report.curves import module_rows
from armor_recipes.report.licence import Licence
from armor_recipes.report.loads import load_rows
from armor_recipes.report.manifest import Facts, build_manifest, calibration_rows, skipped_rows, state_hash
from armor_recipes.report.measure import Stopwatch
from armor_recipes.report.page import write_page
from armor_recipes.report.view import REPORT_VERSION
from armor_recipes.run.checks import check_output, check_weights, placed, precious_paths
from armor_recipes.run.data import Data
from armor_recipes.run.depth import Depth
from armor_recipes.run.evaluating import check_quality, measured
from armor_recipes.run.given import given_changes, run_as_stored
from armor_recipes.run.planning import Job, estimated, prepare, work_estimated
from armor_recipes.run.preflight import Ready, check_disk, preflight
from armor_recipes.run.recipe_lock import Lock, locked_facts, read_lock
from armor_recipes.run.refusals import resource_errors
from armor_recipes.run.result import Result
from armor_recipes.run.resuming import begin, check_alike, complete, hash_tensors, in_place, journaled, resumed_row
from armor_recipes.run.settling import Measured, is_settled, settled
from armor_recipes.run.verify import verify_reloaded
from armor_recipes.session import Session
from armor_recipes.session.journal import FileJournal, Journal
from armor_recipes.session.measuring import MEASURING
from armor_recipes.session.shared import SharedJournal
from armor_recipes.solver.sweep import sweep_form

#: Tokens of a sample that outputs are compared on where a recipe calibrates on none.
_PROBED = 32
RECIPE_FILE = "recipe.yaml"

RecipeLike = Recipe | str | Path | Mapping[str, object] | Sequence[str | Path]


def apply(
    recipe: RecipeLike,
    model: str | Path | PreTrainedModel | None = None,
    *,
    tokenizer: Any | None = None,
    overrides: Sequence[str] = (),
    output: str | Path | None = None,
    overwrite: bool = False,
    device: str = "cpu",
    lock: str | Path | None = None,
    fresh: bool = False,
    observer: Observer = ignore_events,
) -> Result:
    """Run a recipe and write its checkpoint: what `armor-apply` does.

    Args:
        recipe: a path, a built-in recipe's name, several of them, a mapping with a recipe's keys, or a `Recipe`.
        model: a hub id, folder or `builtin:` name that replaces the recipe's; or a model in memory, which is compressed in
            place (the recipe's `model` then names where its configuration and tokenizer come from). Fused experts that the recipe
            takes are linear layers in it afterwards, unless the output is dense.
        tokenizer: replaces the one that comes with the model.
        overrides: `a.b.c=value`, as `--set`.
        output: replaces `output.path`.
        overwrite: replace an existing checkpoint at the output path.
        device: where to compute.
        lock: the file that `armor lock` wrote: any difference from it is an error before anything is computed, and tensors that
            it does not name are one afterwards.
        fresh: start over, where a run before was cut short and left a journal. Without it such a run is gone on with. One of a
            model in memory, or with modifiers of llm-compressor, has no journal.
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
    held = None if lock is None else read_lock(user_path(lock))
    resolved = read_recipe(recipe, overrides=overrides, model=named, output=None if output is None else str(output))
    job = prepare(resolved, device=device)
    return execute(job, loaded, tokenizer=tokenizer, overwrite=overwrite, lock=held, fresh=fresh, observer=observer)


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
def execute(
    job: Job,
    model: PreTrainedModel | None = None,
    *,
    tokenizer: Any | None = None,
    overwrite: bool = False,
    lock: Lock | None = None,
    fresh: bool = False,
    observer: Observer = ignore_events,
) -> Result:
    """Carry out a prepared job: preflight, load, evaluate, compress, evaluate again, write, verify, commit.

    With a `lock`, what it depends on is held against that after preflight, and the tensors before the commit.

    Raises ArmorError; QualityError where the recipe's bound on perplexity is not kept: what was written is then beside its place.
    """
    output = user_path(job.recipe.output.path)
    _check_given(job, model, tokenizer, lock)
    check_output(output, job.source, job.recipe, overwrite=overwrite or (in_place(output) and not fresh))
    target = output.resolve()  # the same place to the end, whoever changes the working directory
    watch = Stopwatch(observer)
    with (
        resource_errors(),
        locked(target),
        journaled(target, job, in_memory=model is not None, fresh=fresh) as journal,
        bounded(job),
        resource_errors(),
        watch.anonymous,
        ExitStack() as stack,
    ):
        recover(target)
        there = complete(target)  # nothing with `fresh`, by which the journal is gone
        # As the run before left it.
        check_output(output, job.source, job.recipe, overwrite=overwrite or there is not None)
        ready = preflight(job, model, tokenizer, target, watch, writes=there is None)
        if lock is not None:
            lock.check(locked_facts(job, ready.data))
        check_alike(job)
        first(lambda: ready.data)
        job = replace(job, estimate=estimated(job, tokens=sum(measure.tokens for measure in ready.data.measures)))
        observer(work_estimated(job, {measure.name: measure.tokens for measure in ready.data.measures}))
        room = stack.enter_context(tried(target)) if job.recipe.is_theirs else None
        run = _Run.start(job, model, ready, target, watch, room, journal)
        facts = run.compute()
        report = run.put(facts, lock, overwrite=overwrite) if there is None else run.left(there, lock)
    return Result(
        plan=run.job.plan,
        output=output,
        estimate=run.job.estimate,
        modules=facts.modules,
        results=facts.results,
        evaluations=facts.evaluations,
        report=report,
        promise=None if lock is None else lock.finish(output),
    )


def _check_given(job: Job, model: PreTrainedModel | None, tokenizer: Any | None, lock: Lock | None) -> None:
    """Refuse what cannot be done with a model or tokenizer in memory. Raises ArmorError."""
    if lock is not None and (model is not None or tokenizer is not None):
        raise RecipeError("a lock names a model's files: it cannot be held against a model or tokenizer in memory")
    if model is not None and job.recipe.model.memory is not None:
        raise RecipeError(
            f"model.memory {job.recipe.model.memory} is for a model that is read from its files, and this one is in memory: give "
            "the folder, or leave `memory` out"
        )
    if model is not None and job.recipe.is_theirs:
        raise InputError(
            "llm-compressor runs the whole recipe, on a folder and not in place: save the model, and give the folder as `model`"
        )


@plain_torch()
def follow(job: Job) -> None:
    """Take part in a run that rank 0 executes: compute a share of it, and write nothing. Raises ArmorError."""
    output = user_path(job.recipe.output.path).resolve()
    with bounded(job), resource_errors():
        check_alike(job)
        ready = Ready(None, first(lambda: Data({})), Licence(), Companions({}), 0, 0)
        run = _Run.start(job, None, ready, output, Stopwatch(ignore_events), None, Journal())
        run.compute()


def bounded(job: Job) -> AbstractContextManager[None]:
    """The recipe's bound on memory, where it sets one."""
    memory = job.recipe.model.memory
    return limited(None if memory is None else memory_bytes(memory), f"model.memory {memory}")


@dataclass(slots=True)
class _Run:
    """What is in memory while a job runs."""

    job: Job
    model: PreTrainedModel
    ready: Ready
    output: Path
    watch: Stopwatch
    dtypes: dict[str, torch.dtype]
    journal: Journal
    given: bool
    """Whether the model came in memory, so that the source's files say nothing of its tensors."""
    measured: tuple[Measured, ...] = ()
    """What the recipe left to a measurement."""
    brought: Changes | None = None
    """What a compressed model comes with."""
    carried: tuple[str, ...] = ()
    """Tensors of the source's files that no module of the model holds, written as they are."""
    room: Path | None = None
    """A folder for what llm-compressor writes where it runs the whole recipe."""
    scratch: Scratch | None = None
    """Where weights, activations and results are where the recipe sets the memory."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Of llm-compressor and what it runs on, where it has run the whole recipe."""
    depth: Depth = field(default_factory=Depth)
    """How error grows from block to block."""

    @classmethod
    def start(
        cls,
        job: Job,
        model: PreTrainedModel | None,
        ready: Ready,
        output: Path,
        watch: Stopwatch,
        room: Path | None,
        journal: Journal,
    ) -> _Run:
        """Load the weights, or take those given, and check them."""
        watch.phase("load weights")
        scratch = None
        if model is None:
            if job.recipe.model.memory is not None:
                output.parent.mkdir(parents=True, exist_ok=True)  # of a process on another machine
                scratch = Scratch(output.parent)
            loaded = load_model(job.source, device=job.device, scratch=scratch)
            if ready.nbytes and scratch is None:  # else this process writes nothing, or the files were there before
                # The files of a hub model may have come only now, onto the same disk.
                check_disk(output.parent, ready.nbytes, ready.journal)
        else:
            loaded = placed(model, job.source, job.device)
        linearise(loaded, job.plan.forms)
        check_weights(loaded, job.plan)
        dtypes, brought = written_dtypes(loaded, job.source), None
        if job.source.compressed is not None:
            brought = given_changes(job.source.compressed, job.source.stored_dtype, packed=job.packed)
        if brought is not None and not job.packed:
            rounded(loaded, dtypes)
        return cls(
            job,
            loaded,
            ready,
            output,
            watch,
            dtypes,
            journal,
            model is not None,
            brought=brought,
            room=room,
            scratch=scratch,
        )

    @side_by_side()
    def compute(self) -> Facts:
        """Everything that takes long."""
        job = self.job
        source_hash = state_hash(self.model, self.dtypes, job.source.stored_dtype)
        agree({"model": source_hash})
        begin(self.journal, job, self.ready.data, self.model, source_hash, self.watch)
        if job.recipe.steps or self.scratch is not None:  # the former may rotate what lies between blocks
            self.depth.note = "not recorded with modifiers of llm-compressor, nor with model.memory"
        with ExitStack() as stack:
            with run_as_stored(self.model, {} if self.brought is None else self.brought.quantized):
                self.depth.before(self.model, self.probe())
                measures = measured(self.ready.data.measures, self.model, self.watch, self.output, self.journal)
                measured_again = stack.enter_context(measures)
            session = None
            if self.room is None:
                session = self.compress()
            else:
                self.take_whole(self.room / "result")
            self.depth.after(self.model, self.probe())
            evaluations = measured_again(self.model)
        self.watch.together()
        return Facts(
            recipe=self.job.recipe,
            plan=self.job.plan,
            source_sha256=source_hash,
            stored_dtype=job.source.stored_dtype,
            compute_dtype=job.source.compute_dtype,
            device=job.device.type,
            attention=attention_of(self.model),
            tokens=self.ready.data.tokens,
            modules={} if session is None else session.results,
            results=() if session is None else session.state.results,
            caches={} if session is None else session.state.caches,
            evaluations=evaluations,
        )

    def compress(self) -> Session:
        """Run a session to its end; it holds the results."""
        journal = SharedJournal(self.journal)
        if self.job.recipe.steps:
            self.take_steps()
        untie(self.model, self.job.plan.untied)
        if not is_settled(self.job):
            self.watch.phase(MEASURING)
            self.job, self.measured = settled(self.job, self.model, self.ready.data.tokens, self.watch.observer)
            journal.same("plan as settled", self.job.plan.sha256)
        job, teacher = self.job, None
        if job.teacher is not None:
            teacher = load_teacher(job.teacher, self.model, job.plan.forms)
            journal.same("teacher", hash_tensors(teacher))
        self.watch.phase("compress")
        with Session(
            job.recipe,
            job.plan,
            self.model,
            job.modifiers,
            self.ready.data.tokens,
            stored_dtype=job.source.stored_dtype,
            keep_packed=job.packed,
            observer=self.watch.observer,
            brought=self.brought,
            teacher=teacher,
            journal=journal,
            scratch=self.scratch,
            seconds=job.estimate.cpu_seconds_by_entry,
        ) as session:
            session.run()
        return session

    def take_whole(self, result: Path) -> None:
        """Let llm-compressor run the recipe; the model in memory is the one that it wrote, from here on."""
        self.watch.phase("llm-compressor")
        restore(self.model)
        dtypes = written_dtypes(self.model, self.job.source)
        dtype = self.job.source.stored_dtype
        taken = run_whole(self.model, self.step(), result, probe=self.probe(), dtype=dtype, dtypes=dtypes)
        self.model, self.versions = taken.model, taken.versions

    def take_steps(self) -> None:
        """Let llm-compressor change the dense model first; all that follows goes on from that."""
        self.watch.phase("llm-compressor")
        restore(self.model)
        dtypes = written_dtypes(self.model, self.job.source)
        run_step(self.model, self.step(), dtype=self.job.source.stored_dtype, dtypes=dtypes)
        linearise(self.model, self.job.plan.forms)
        check_weights(self.model, self.job.plan)

    def step(self) -> Step:
        """What llm-compressor runs, with the samples of the recipe's calibration."""
        job, given = self.job, self.ready.data.tokens
        inputs = None if job.recipe.calibration is None else given.get(job.recipe.calibration)
        samples = [] if inputs is None else [arguments(inputs.sample(n)) for n in range(len(inputs))]
        return Step([(step.kind, step.fields) for step in job.recipe.steps], self.ready.tokenizer, samples)

    @contextmanager
    def told_as_lost(self, output: Path, facts: Facts) -> Iterator[None]:
        """What disk or memory runs out before the weights are written, as an error that says what is lost with it."""
        try:
            yield
        except Exception as error:
            what = what_ran_out(error)
            if not what:
                raise
            lost = f"{len(facts.modules)} compressed modules ({self.watch.seconds.get('compress', 0.0):.0f} s of work)"
            fate = "they are lost, and have to be computed again"
            if self.given:
                fate = "they are in the model that was given"
            elif isinstance(self.journal, FileJournal):
                fate = "they are in the journal beside it"
            raise ResourceError(f"{what}. {lost} were not written to {output}: {fate}") from error

    def put(self, facts: Facts, lock: Lock | None, *, overwrite: bool) -> Mapping[str, Any]:
        """Write the output, check it and put it in its place; returns its report."""
        precious = precious_paths(self.job.source, self.job.recipe)
        with staged(self.output, overwrite=overwrite, precious=precious) as folder:
            self.watch.phase("save")
            with self.told_as_lost(self.output, facts):
                self.write_weights(folder, facts)
            with kept_aside(folder, self.output):
                self.write_rest(folder, facts)
                report = self.check(folder, facts, lock)
                self.journal.written(folder / MANIFEST_FILE)
        return report

    def left(self, report: Mapping[str, Any], lock: Lock | None) -> Mapping[str, Any]:
        """The report of the output that a run before, of which the journal is, had put in its place."""
        if lock is not None:
            lock.check_output(self.output)
        text = f"{self.output} is complete: the run that wrote it was cut short before its journal was removed, which is done now"
        self.watch.observer(PhaseStarted(text))
        return report

    def write_weights(self, folder: Path, facts: Facts) -> None:
        """Write what took long into an empty folder: a model that can be loaded. What stock loaders read has no linear forms."""
        if self.room is not None:
            taken = self.room / "result"
            (taken / RECIPE_FILE).unlink(missing_ok=True)  # llm-compressor's words for what ours says
            for file in sorted(taken.iterdir()):
                moved = file.replace(folder / file.name)
                if moved.is_file():
                    give_usual_permissions(moved)
            return
        layers = {name: result.packed for name, result in facts.modules.items() if result.packed is not None}
        quantized = {n: result.quantized for n, result in facts.modules.items() if result.quantized is not None}
        if not (self.job.packed and (layers or quantized)) and restore(self.model):
            self.dtypes = written_dtypes(self.model, self.job.source)
        base = self.job.source.files
        write_checkpoint(
            self.model,
            layers,
            folder,
            dtype=self.job.source.stored_dtype,
            quantized=quantized,
            caches=facts.caches,
            dtypes=self.dtypes,
            base_config={} if base is None else read_config(base),
            scratch=self.scratch,
        )

    def write_rest(self, folder: Path, facts: Facts) -> None:
        """Write everything else but the report; the manifest comes last, since it hashes the tensors."""
        quantization = read_config(folder).get("quantization_config")
        version = version_of(quantization)
        there = None if self.given or self.room is not None else self.job.source.stored()
        if there is not None:
            own = self.job.source.uncompressed(there.tensors)
            self.carried = left_behind(self.model, read_header(folder), own, packed=quantization is not None)
        if there is not None and self.carried:
            # Listed first: a loader refuses tensors of no module that no manifest names.
            listed = {"format_version": version, "carried_over": list(self.carried)}
            write_whole(folder / MANIFEST_FILE, json.dumps(listed).encode())
            carry_over(folder, there, self.carried)
        write_beside(folder, self.ready.files(facts, self.job.source), tokenizer=self.ready.tokenizer)
        manifest = build_manifest(facts, tensor_hashes(folder), format_version=version)
        manifest["carried_over"] = list(self.carried)
        if self.versions:
            manifest["llmcompressor"] = {"versions": self.versions, "modifiers": [s.key for s in self.job.recipe.steps]}
        manifest["files"] = sorted({*files_below(folder), MANIFEST_FILE, *REPORT_FILES})
        manifest["file_hashes"] = file_hashes(folder)
        write_whole(folder / MANIFEST_FILE, (json.dumps(manifest, indent=2) + "\n").encode())

    def check(self, folder: Path, facts: Facts, lock: Lock | None) -> dict[str, Any]:
        """Hold what was written against the model in memory, the lock and the recipe's bound; returns the report, written by then.

        Raises VerificationError, QualityError.
        """
        if self.room is None:  # else it was held against the model in memory as it was loaded
            self.watch.phase("verify")
            verify_reloaded(folder, self.model, packed=self.job.packed, probe=self.probe(), scratch=self.scratch)
        report = self.report(folder, facts)
        if lock is not None:
            lock.check_output(folder)
        check_quality(self.job.recipe, facts.evaluations)
        return report

    def report(self, folder: Path, facts: Facts) -> dict[str, Any]:
        """Write what is no function of the inputs; returns it."""
        job = self.job
        report = {
            "report_version": REPORT_VERSION,
            **self.watch.report(folder, source=job.source.folder, estimate=job.estimate, modules=facts.modules),
            "seconds_by_refinement": {f"{r.modifier} {r.unit}": round(r.seconds, 3) for r in facts.refinements},
            "modules": module_rows(facts),
            "depth": self.depth.report(),
            "loads": load_rows(facts, job.shapes),
            "calibration": calibration_rows(facts),
            "experts": facts.experts,
            "sweep": sweep_form(job.device.type),
            **resumed_row(self.journal),
            **({"measured": [one.to_dict() for one in self.measured]} if self.measured else {}),
            **skipped_rows(job.plan),
            "left_out": list(self.ready.companions.left_out),
            "carried_over": list(self.carried),
        }
        write_whole(folder / "report.json", (json.dumps(report, indent=2) + "\n").encode())
        write_page(folder, self.output.name)
        return report

    def probe(self) -> Batch:
        """A calibration sample, or random inputs, to compare outputs on."""
        for samples in self.ready.data.tokens.values():
            return samples.sample(0)
        length = min(_PROBED, self.job.source.facts.positions or _PROBED)
        return draw(random_inputs(self.job.shapes, length), 1, torch.Generator().manual_seed(0))


__all__ = ["Job", "apply", "builtin_recipe_dir", "execute", "follow", "prepare", "read_recipe"]
