"""`armor_manifest.json`: everything that is a function of the inputs, so that equal runs write equal bytes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from armor_recipes.calibration.tokens import TokenSet
from armor_recipes.checkpoint.config import FORMAT_VERSION
from armor_recipes.evaluation.perplexity import Perplexity
from armor_recipes.recipe import Recipe
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.session import FactorChange, ModuleResult, Plan, RearrangeResult, RefineResult
from armor_recipes.solver.sweep import sweep_form
from armor_recipes.version import __version__

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
    tokens: Mapping[CalibrationSpec, TokenSet]
    modules: Mapping[str, ModuleResult]
    refinements: Sequence[RefineResult]
    rearrangements: Sequence[RearrangeResult]
    before: Perplexity | None
    after: Perplexity | None


def build_manifest(facts: Facts, tensors: Mapping[str, str]) -> dict[str, Any]:
    """Plain data for the manifest; `tensors` are SHA-256 by name, as written."""
    plans = {module.name: module for module in facts.plan.modules}
    return {
        "format_version": FORMAT_VERSION,
        "armor_recipes": __version__,
        "versions": {name: version(name) for name in _PACKAGES},
        "compute": {
            "device": facts.device,
            "compute_dtype": str(facts.compute_dtype).removeprefix("torch."),
            "stored_dtype": str(facts.stored_dtype).removeprefix("torch."),
            "sweep": sweep_form(facts.device),
        },
        "recipe_sha256": facts.recipe.hash(),
        "model": {"id": facts.recipe.model.id, "revision": facts.recipe.model.revision, "sha256": facts.source_sha256},
        "calibration": calibration_rows(facts),
        "evaluation": {"before": _perplexity(facts.before), "after": _perplexity(facts.after)},
        "totals": {
            "modules": facts.plan.totals.modules,
            "bytes_before": facts.plan.totals.bytes_before,
            "bytes_after": facts.plan.totals.bytes_after,
            "factor_bytes": facts.plan.totals.factor_bytes,
        },
        "modules": {name: _module(result, plans[name].block_size) for name, result in facts.modules.items()},
        "rearrangements": [_rearrangement(result) for result in facts.rearrangements],
        "refinements": [_refinement(result) for result in facts.refinements],
        "tensors": dict(sorted(tensors.items())),
    }


def _module(result: ModuleResult, block_size: tuple[int, int] | None) -> dict[str, Any]:
    return {
        "modifier": result.modifier,
        "block_size": None if block_size is None else list(block_size),
        "first_loss": result.losses[0],
        "last_loss": result.losses[-1],
        "stored_loss": result.stored_loss,
        "relative_error": result.error,
        "iterations": result.iterations,
        "stop_reason": result.stop_reason,
        "tokens": result.tokens,
        "counts": dict(result.counts),
        "measures": dict(result.measures),
        "refined": list(result.refined),
        "changes": [_change(change) for change in result.changes],
    }


def _change(change: FactorChange) -> dict[str, Any]:
    return {
        "modifier": change.modifier,
        "core": change.core,
        "first_loss": change.losses[0],
        "last_loss": change.losses[-1],
        "stored_loss": change.stored_loss,
        "iterations": change.iterations,
        "stop_reason": change.stop_reason,
        "tokens": change.tokens,
        "counts": dict(change.counts),
    }


def _rearrangement(result: RearrangeResult) -> dict[str, Any]:
    return {
        "modifier": result.modifier,
        "consumer": result.consumer,
        "producers": list(result.producers),
        "kept_before": result.kept_before,
        "kept_after": result.kept_after,
        "moved": result.moved,
        "order_sha256": result.order_sha256,
        "tokens": result.tokens,
    }


def _refinement(result: RefineResult) -> dict[str, Any]:
    return {
        "modifier": result.modifier,
        "unit": result.unit,
        "modules": result.modules,
        "norm_values": result.vectors,
        "tokens": result.tokens,
        "losses": list(result.losses),
        "steps": result.steps,
        "clipped": result.clipped,
        "stop_reason": result.stop_reason,
        "compute_dtype": result.compute_dtype,
    }


def calibration_rows(facts: Facts) -> list[dict[str, Any]]:
    """What was calibrated on: for each set who used it, how many windows came of how many asked, and what each dataset gave.

    Local files go by their names alone, so that nothing depends on the folder.
    """
    return [
        {
            "modifiers": [entry.key for entry in facts.recipe.modifiers if entry.config.calibration == spec],
            "asked": tokens.asked,
            "samples": len(tokens.ids),
            "sequence_length": tokens.ids.shape[1],
            "sha256": tokens.sha256,
            "sources": [{**asdict(source), "dataset": dataset_name(source.dataset)} for source in tokens.sources],
        }
        for spec, tokens in facts.tokens.items()
    ]


def dataset_name(dataset: str) -> str:
    """A dataset's name without the folder of a local file."""
    return Path(dataset).name if Path(dataset).is_absolute() else dataset


def _perplexity(measured: Perplexity | None) -> dict[str, Any] | None:
    if measured is None:
        return None
    return {
        "perplexity": measured.value,
        "nll": measured.nll,
        "tokens": measured.tokens,
        "windows": measured.windows,
        "sha256": measured.sha256,
    }


def state_hash(model: nn.Module, dtype: torch.dtype) -> str:
    """SHA-256 over a model's parameters, sorted by name, in their stored dtype: what the run started from."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {dtype}\n".encode())
        digest.update(parameter.detach().to(dtype).contiguous().cpu().view(torch.uint8).numpy().data)
    return digest.hexdigest()
