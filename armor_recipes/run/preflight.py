"""Everything that can fail cheaply, tried before the first long computation: after it nothing cheap can fail.

Nothing stays of the trial but what the run goes on with: text as tokens, licence and companions as bytes.
"""

from __future__ import annotations

import json
import resource
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from armor_recipes.checkpoint.companions import PROCESSORS, TOKENIZERS, Companions, companions
from armor_recipes.checkpoint.config import FORMAT_VERSION
from armor_recipes.checkpoint.files import MANIFEST_FILE, read_config
from armor_recipes.checkpoint.staging import tried
from armor_recipes.checkpoint.writer import DEFAULT_SHARD_BYTES, write_beside, write_configs
from armor_recipes.compute.ranks import ranks
from armor_recipes.errors import ArmorError, InputError, ResourceError
from armor_recipes.evaluation.room import check_room
from armor_recipes.exhaustion import what_ran_out
from armor_recipes.integrations.models import (
    ModelSource,
    fetch_files,
    hub_id,
    load_tokenizer,
    with_generation_config,
    written_dtypes,
)
from armor_recipes.integrations.names import left_behind
from armor_recipes.model.ties import tied_output
from armor_recipes.plan.memory import activation_bytes
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.report.card import model_card
from armor_recipes.report.licence import Licence, base_licence
from armor_recipes.report.manifest import Facts, build_manifest
from armor_recipes.report.measure import Stopwatch
from armor_recipes.run.checks import check_given
from armor_recipes.run.data import Data, read_data
from armor_recipes.run.planning import Job
from armor_recipes.run.refusals import Refusals
from armor_recipes.run.resuming import journal_bytes

#: What a checkpoint takes besides its tensors: headers, manifest and report, a file system's own blocks.
_MARGIN, _LEAST_MARGIN = 0.01, 16_000_000


@dataclass(frozen=True, slots=True)
class Ready:
    """What a run needs besides the weights: read, and tried."""

    tokenizer: Any | None
    data: Data
    licence: Licence
    companions: Companions
    nbytes: int
    """Of all tensors that will be written."""
    journal: int
    """What the run's journal takes at most, with what evaluation keeps of the dense model."""

    def files(self, facts: Facts, source: ModelSource) -> dict[str, bytes]:
        """What lies beside weights, tokenizer, manifest and report: name → content."""
        return {
            **self.companions.files,
            **self.licence.files,
            "README.md": model_card(facts, self.licence, base_model=hub_id(source)).encode(),
            "recipe.yaml": facts.recipe.resolved_yaml().encode(),
        }


def preflight(
    job: Job,
    model: PreTrainedModel | None,
    tokenizer: Any | None,
    output: Path,
    watch: Stopwatch,
    *,
    writes: bool = True,
) -> Ready:
    """Try everything: the model given, names, licence, companions, saving, the tokenizer, the disk, the data, in this order.

    Where it `writes` nothing, because a run before has, the disk need take no more.

    What rests on something that was refused is not tried. All that is refused is told at once, in the class of the first.
    """
    watch.phase("preflight")
    refused = Refusals()
    licence, beside, usable, nbytes = Licence(), Companions({}), False, 0
    with tried(output) as folder:
        with refused.noted():
            _try_model(job, model, folder)
        with refused.noted():
            licence = base_licence(job.source)
        with refused.noted():
            beside = _companions(job.source, with_tokenizer=tokenizer is None)
        with refused.noted():
            _try_files(job, Ready(None, Data({}), licence, beside, 0, 0), folder)
        with refused.noted():
            tokenizer = load_tokenizer(job.source) if tokenizer is None else tokenizer
            with _savable(f"the tokenizer of {job.source.location}", "give one that save_pretrained can save"):
                write_beside(folder, {}, tokenizer=tokenizer)
            usable = True
        with refused.noted():
            nbytes = _bytes_of_tensors(job, model) if writes else 0
            check_disk(folder.parent, nbytes, 0)  # what is small lies there now
    watch.phase("tokenize")
    data = read_data(job.recipe, job.source, job.shapes, job.modifiers, tokenizer, refused) if usable else Data({})
    kept = sum(measure.dense_bytes(job.shapes) for measure in data.measures)
    samples = {spec: len(found.origins) for spec, found in data.tokens.items()}
    journal = journal_bytes(job, output, samples) if writes and model is None else 0
    scratch = scratch_bytes(job, nbytes, samples)
    if not refused:
        check_disk(output.parent, nbytes, journal, scratch)
    with refused.noted():
        check_room(output.parent, kept, beside=nbytes + journal + scratch)
    if refused:
        refused.tell()
    return Ready(tokenizer, data, licence, beside, nbytes, journal + kept)


def _try_model(job: Job, model: PreTrainedModel | None, folder: Path) -> None:
    """Names and dtypes of its tensors, and its configurations saved."""
    if model is None:
        subject = with_generation_config(job.shapes, job.source)
    else:
        check_given(model, job.shapes, job.plan, job.source)
        subject = model
    layers = {row.name: row.spec for row in job.plan.stored.values() if row.spec is not None and job.packed}
    base = job.source.files
    with _savable(f"the configuration of {job.source.location}", "correct it, or generation_config.json beside it"):
        write_configs(
            subject,
            layers,
            folder,
            dtype=job.source.stored_dtype,
            quantized={row.name: row.quantized for row in job.plan.stored.values() if row.quantized is not None},
            cache=next((row.scheme for row in job.plan.caches), None),
            base_config={} if base is None else read_config(base),
            shapes=job.shapes,
        )


def _companions(source: ModelSource, *, with_tokenizer: bool) -> Companions:
    """Files beside the base model's weights that come along; those of its tokenizer only where it is that which is saved."""
    patterns = (*PROCESSORS, *(TOKENIZERS if with_tokenizer else ()))
    fetch_files(source, patterns)
    return Companions({}) if source.files is None else companions(source.files, patterns)


def _try_files(job: Job, ready: Ready, folder: Path) -> None:
    """Model card, recipe, companions and manifest, of a run that has done nothing yet."""
    facts = Facts(
        recipe=job.recipe,
        plan=job.plan,
        source_sha256="",
        stored_dtype=job.source.stored_dtype,
        compute_dtype=job.source.compute_dtype,
        device=job.device.type,
        attention=None,
        tokens={},
        modules={},
        results=(),
        evaluations=(),
    )
    manifest = json.dumps(build_manifest(facts, {}, format_version=FORMAT_VERSION)).encode()
    write_beside(folder, {**ready.files(facts, job.source), MANIFEST_FILE: manifest})


@contextmanager
def _savable(what: str, advice: str) -> Iterator[None]:
    """Whatever a library raises while it saves, as InputError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ArmorError) or what_ran_out(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{what} cannot be saved ({type(error).__name__}: {reason}): {advice}") from error


def _bytes_of_tensors(job: Job, model: PreTrainedModel | None) -> int:
    """What all tensors will take: those of the plan, those that stay as they are, and those that are carried over.

    The latter are read once, since nobody else does before the end.
    """
    subject = job.shapes
    state: dict[str, Tensor] = subject.state_dict()
    dtypes = written_dtypes(subject, job.source)
    planned = {f"{n}.weight" for row in job.plan.stored.values() for n in (row.name, *(row.uses if job.packed else ()))}
    rest = {n: t for n, t in state.items() if n not in planned and n not in subject.all_tied_weights_keys}
    nbytes: int = sum(t.numel() * (dtypes[n].itemsize if n in dtypes else t.element_size()) for n, t in rest.items())
    total: int = job.plan.totals.bytes_after + nbytes
    output = tied_output(subject) if job.recipe.steps else None
    if output is not None:  # llm-compressor may untie it
        total += subject.get_parameter(f"{output}.weight").numel() * job.source.stored_dtype.itemsize
    there = job.source.stored() if model is None else None
    carried = (
        ()
        if there is None
        else left_behind(subject, set(rest) | planned, job.source.uncompressed(there.tensors), packed=True)
    )
    if there is None or not carried:
        return total
    for name in carried:
        there.read(name)
    total += sum(there.tensors[name].nbytes for name in carried)
    return total + min(total, DEFAULT_SHARD_BYTES)  # the file that takes them is written anew beside itself


def scratch_bytes(job: Job, written: int, samples: Mapping[CalibrationSpec, int]) -> int:
    """What lies in files where the recipe sets `model.memory`, for each process: weights, activations, factors that steps compute
    with or that no journal keeps, and what is cast to be written.
    """
    if job.recipe.model.memory is None:
        return 0
    compute, stored = job.source.compute_dtype, job.source.stored_dtype
    weights = sum(parameter.numel() for parameter in job.shapes.parameters()) * compute.itemsize
    computed_with = ranks().size > 1 or any(modifier.needs.factors for modifier in job.modifiers.values())
    factors = sum(row.bytes_after for row in job.plan.stored.values() if row.stored_as == "packed") * computed_with
    held = activation_bytes(job.plan, job.recipe, job.shapes, job.modifiers, samples) + (
        written if compute != stored else 0
    )
    return ranks().size * (weights + factors) + held


def check_disk(folder: Path, tensors: int, journal: int, scratch: int = 0) -> None:
    """Raise ResourceError where tensors, a journal and a scratch of so many bytes do not fit on its disk as it is."""
    needed = tensors + max(int(_MARGIN * tensors), _LEAST_MARGIN) + journal + scratch
    free = shutil.disk_usage(folder).free
    if free < needed:
        kept = f"; up to {journal / 1e9:.3g} GB are the journal's, from which a run goes on" if journal else ""
        kept += (
            f"; {scratch / 1e9:.3g} GB are for what lies in files within model.memory, until the run ends"
            if scratch
            else ""
        )
        raise ResourceError(
            f"about {needed / 1e9:.3g} GB are to be written, and {free / 1e9:.3g} GB are free on the disk of {folder} (a "
            f"checkpoint that is replaced stays until the new one is complete{kept}): free some, or set output.path"
        )
    largest, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    file = min(tensors, DEFAULT_SHARD_BYTES)
    if largest not in (-1, resource.RLIM_INFINITY) and largest < file:
        raise ResourceError(
            f"a file of about {file / 1e9:.3g} GB is to be written, and this process may write {largest / 1e9:.3g} GB to "
            "one: raise the limit (ulimit -f)"
        )
