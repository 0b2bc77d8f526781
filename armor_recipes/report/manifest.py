"""`armor_manifest.json`: everything that is a function of the inputs, so that equal runs write equal bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import nn

from armor_recipes.calibration.inputs import TOKENS, InputSet, Source
from armor_recipes.checkpoint.quantized import QuantizedCache
from armor_recipes.evaluation import Evaluation
from armor_recipes.modifiers.kinds.changes import ModuleResult, StepResult
from armor_recipes.modifiers.kinds.module import ModulePlan
from armor_recipes.modifiers.kinds.refiner import RefineResult
from armor_recipes.plan import Plan, Totals
from armor_recipes.recipe import Recipe
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.report.evaluation import evaluation_dict
from armor_recipes.report.experts import expert_rows, totals_done
from armor_recipes.report.machine import machine_class
from armor_recipes.report.names import shared, without_folders
from armor_recipes.solver.sweep import sweep_form
from armor_recipes.version import __version__, release_of

_PACKAGES = ("torch", "transformers", "compressed-tensors", "safetensors", "tokenizers", "datasets", "numpy")


@dataclass(frozen=True, slots=True)
class Facts:
    """What manifest and model card are written from; nothing in it depends on time or place."""

    recipe: Recipe
    plan: Plan
    source_sha256: str
    stored_dtype: torch.dtype
    compute_dtype: torch.dtype
    device: str
    attention: str | dict[str, Any] | None
    tokens: Mapping[CalibrationSpec, InputSet]
    modules: Mapping[str, ModuleResult]
    results: Sequence[StepResult]
    evaluations: Sequence[Evaluation]
    caches: Mapping[str, QuantizedCache] = field(default_factory=dict)

    @property
    def refinements(self) -> tuple[RefineResult, ...]:
        """What was trained, in order."""
        return tuple(result for result in self.results if isinstance(result, RefineResult))

    @property
    def totals(self) -> Totals:
        """Of what was done: the plan's, less experts that were left alone."""
        return totals_done(self.plan, self.modules, self.results)

    @property
    def experts(self) -> list[dict[str, Any]]:
        """How many calibration tokens the experts of each layer saw; empty without experts."""
        return expert_rows(self.recipe, self.modules, self.results)

    @property
    def model_name(self) -> str:
        """The model as others may read of it: a path of this machine by its last part."""
        return without_folders(self.recipe.model.id)

    def shared_recipe(self) -> str:
        """The resolved recipe as it was asked for, as YAML, paths of this machine by their last parts."""
        return replace(self.recipe, resolved=shared(self.recipe.asked or self.recipe.resolved)).resolved_yaml()


def build_manifest(facts: Facts, tensors: Mapping[str, str], *, format_version: int) -> dict[str, Any]:
    """Plain data for the manifest; `tensors` are SHA-256 by name, as written, in a layout of `format_version`."""
    plans, totals, experts = facts.plan.stored, facts.totals, facts.experts
    return {
        "format_version": format_version,
        "armor_recipes": __version__,
        "versions": {name: version for name, version in versions().items() if name in _PACKAGES},
        "compute": {
            "device": facts.device,
            "compute_dtype": str(facts.compute_dtype).removeprefix("torch."),
            "stored_dtype": str(facts.stored_dtype).removeprefix("torch."),
            "sweep": sweep_form(facts.device),
            "attention": facts.attention,
        },
        "machine": machine_class(facts.device),
        "recipe_sha256": facts.recipe.hash(),
        "model": {"id": facts.model_name, "revision": facts.recipe.model.revision, "sha256": facts.source_sha256},
        "calibration": calibration_rows(facts),
        "evaluation": evaluation_dict(facts.evaluations),
        "totals": {
            "modules": totals.modules,
            "bytes_before": totals.bytes_before,
            "bytes_after": totals.bytes_after,
            "factor_bytes": totals.factor_bytes,
        },
        "modules": {name: _module(result, plans[name]) for name, result in facts.modules.items()},
        **({"experts": experts} if experts else {}),
        **sections(facts.results),
        **({"linear_forms": list(facts.plan.forms)} if facts.plan.forms else {}),
        **skipped_rows(facts.plan),
        "tensors": dict(sorted(tensors.items())),
    }


def versions(*, llmcompressor: bool = False) -> dict[str, str]:
    """The releases that bytes may depend on, this package's among them, by the names of packages."""
    others = (*_PACKAGES, *(["llmcompressor"] if llmcompressor else []))
    return {"armor-recipes": __version__, **{name: release_of(name) for name in others}}


def _module(result: ModuleResult, plan: ModulePlan) -> dict[str, Any]:
    return {"block_size": None if plan.block_size is None else list(plan.block_size), **result.to_dict()}


def skipped_rows(plan: Plan) -> dict[str, list[Any]]:
    """Targeted modules that were left as they are, with the reasons, as `skipped`, what does not count for one as `overridden`,
    and the plan's `warnings`; nothing where there are none.
    """
    told: dict[str, tuple[Any, ...]] = {
        "skipped": plan.skipped,
        "overridden": plan.overridden,
        "warnings": plan.warnings,
    }
    return {name: [asdict(one) for one in rows] for name, rows in told.items() if rows}


def sections(results: Sequence[StepResult]) -> dict[str, list[dict[str, Any]]]:
    """What was measured besides modules, as plain data: a list for each section, in order."""
    found: dict[str, list[dict[str, Any]]] = {"rearrangements": [], "refinements": []}
    for result in results:
        found.setdefault(result.section, []).append(result.to_dict())
    return found


def calibration_rows(facts: Facts) -> list[dict[str, Any]]:
    """What was calibrated on: for each set who used it, how many windows came of how many asked, and what each dataset gave.

    `bos` are the ids that every window begins with, `suffix` those that it ends with, if any, `end_of_text` is the one put after
    each document, or null; where samples are more than token ids, `inputs` are dtype and shape of one, or all `shapes` that there
    are. Each source says whether it was a `stream`. Local files go by their names alone, so that nothing depends on the folder.
    """
    return [
        {
            "modifiers": used_by(facts.recipe, spec),
            "asked": tokens.asked,
            "samples": len(tokens),
            "sequence_length": _length(tokens),
            "documents": spec.documents,
            "bos": list(tokens.prefix),
            **({"suffix": list(tokens.suffix)} if tokens.suffix else {}),
            "end_of_text": tokens.end_of_text,
            **({} if tokens.is_windows else {"inputs": _inputs(tokens)}),
            "sha256": tokens.sha256,
            "sources": [_source(source) for source in tokens.sources],
        }
        for spec, tokens in facts.tokens.items()
    ]


def used_by(recipe: Recipe, spec: CalibrationSpec) -> list[str]:
    """The keys of those that learn from these samples."""
    return [entry.key for entry in recipe.modifiers if entry.config.calibration == spec] + [
        step.key for step in recipe.steps if recipe.calibration == spec
    ]


def _source(source: Source) -> dict[str, Any]:
    """A source as plain data; `cut` is told where samples were cut."""
    row = {**asdict(source), "dataset": without_folders(source.dataset)}
    return row if source.cut else {name: value for name, value in row.items() if name != "cut"}


def _length(samples: InputSet) -> int | None:
    """Tokens of each sample; None where there are none, or not of all as many."""
    lengths = {group[TOKENS].shape[1] for group in samples.groups if TOKENS in group}
    return lengths.pop() if len(lengths) == 1 else None


def _inputs(samples: InputSet) -> dict[str, dict[str, Any]]:
    """Dtype and shape of a sample's tensors, of those that have several shapes all, in the order of the samples."""
    found = {}
    for name, x in sorted(samples.tensors.items()):
        shapes = list(dict.fromkeys(tuple(group[name].shape[1:]) for group in samples.groups))
        shape = {"shape": list(shapes[0])} if len(shapes) == 1 else {"shapes": list(map(list, shapes))}
        found[name] = {"dtype": str(x.dtype).removeprefix("torch."), **shape}
    return found


def state_hash(model: nn.Module, dtypes: Mapping[str, torch.dtype], default: torch.dtype) -> str:
    """SHA-256 over a model's parameters, sorted by name, in their stored dtypes: what the run started from."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        dtype = dtypes.get(name, default)
        digest.update(f"{name} {tuple(parameter.shape)} {dtype}\n".encode())
        digest.update(parameter.detach().to(dtype).contiguous().cpu().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
