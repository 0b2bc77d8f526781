"""`armor export`: a checkpoint in another format, checked first, put in place when it is complete."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from armor_recipes.checkpoint.config import VALUES, cache_of
from armor_recipes.checkpoint.export import Exported, Merge, Source, Target, export
from armor_recipes.checkpoint.files import CONFIG_FILE, read_config
from armor_recipes.checkpoint.lock import locked
from armor_recipes.checkpoint.staging import check_destination, staged
from armor_recipes.compute import plain_torch
from armor_recipes.errors import PlanError, RecipeError
from armor_recipes.integrations.loading import lay_out
from armor_recipes.integrations.models import meta_model, open_model
from armor_recipes.integrations.names import fused_of, loaded_as, misread, stored_names
from armor_recipes.model.forms import fused_state, layouts
from armor_recipes.paths import user_path
from armor_recipes.recipe.schema import ModelSpec


@plain_torch()
def export_folder(folder: Path, destination: Path, *, to: Target, overwrite: bool = False) -> Exported:
    """Write the checkpoint in `folder` to `destination` in another format.

    Raises:
        RecipeError: if something is at `destination` and `overwrite` is false, or the two folders overlap.
        LockedError: if another run is writing there.
        ResourceError: if the disk runs full.
        PlanError: if there is nothing to convert, or the format cannot hold it.
        CheckpointError: if `folder` is damaged.
    """
    folder, destination = user_path(folder), user_path(destination)
    precious = {"the checkpoint that is exported": folder}
    check_destination(destination, overwrite=overwrite, precious=precious)
    if folder.resolve().is_relative_to(destination.resolve()) or destination.resolve().is_relative_to(folder.resolve()):
        raise RecipeError(f"{destination} and {folder} lie one in the other: choose another folder to write to")
    with locked(destination):
        quantization = read_config(folder).get("quantization_config")
        _refuse_cache(folder, quantization, to)
        source, ignore = _opened(folder, quantization, to)
        with staged(destination, overwrite=overwrite, precious=precious) as staging:
            merges, names = _as_stock(folder, source, quantization, to)
            return export(source, staging, to=to, ignore=ignore, merges=merges, names=names)


def _refuse_cache(folder: Path, quantization: object, to: Target) -> None:
    """Raise PlanError where keys and values are quantised: what is written would run without that, beside scales of nothing."""
    if cache_of(quantization, where=str(folder / CONFIG_FILE)) is not None:
        raise PlanError(
            f"{folder} has a quantised cache of keys and values (kv_cache_scheme in its config.json), for which {to} has no place: "
            "run its recipe without kv_cache_scheme, and export that"
        )


def _opened(folder: Path, quantization: dict[str, object] | None, to: Target) -> tuple[Source, list[str]]:
    """The folder, and the names of the linear layers that are neither packed nor quantised in what is written."""
    source = Source.open(folder) if quantization is not None else None
    if source is not None and (source.kind == "legacy" or to != "armor" or not source.plain):
        return source, _ignored(quantization or {})
    linears = _linears(folder)
    source = Source.open(folder, linears) if source is None else Source.packable(folder, linears)
    return source, sorted(linears - source.specs.keys() - source.plain.keys() - source.packed.keys())


def _as_stock(
    folder: Path, source: Source, quantization: dict[str, object] | None, to: Target
) -> tuple[tuple[Merge, ...], dict[str, str]]:
    """What stock loaders have in one tensor and an ARMOR checkpoint in linear layers, and tensors that files name otherwise.

    Raises PlanError where the format has no place for such layers, or a stock loader would take the tensors for others.
    """
    if source.kind != "armor" or quantization is None:
        return (), {}
    model = meta_model(open_model(ModelSpec(id=str(folder)), device=torch.device("cpu"), compressed=True))
    forms = lay_out(model, (*source.specs, *source.plain, *_ignored(quantization)))
    if forms and to not in ("dense", "dense-2of4"):
        raise PlanError(
            f"{folder} ({type(model).__name__}): {forms[0]} and {len(forms) - 1} more are linear layers in ARMOR checkpoints "
            f"alone, which {to} has no place for: export to dense"
        )
    merges = tuple(
        Merge(
            f"{form}.{fused}", shape, {f"{form}.{n}": p.write for n, p in layout.parts.items() if p.parameter == fused}
        )
        for form, layout in layouts(model).items()
        for fused, shape in layout.fused.items()
    )
    return merges, _other_names(folder, model, source)


def _other_names(folder: Path, model: PreTrainedModel, source: Source) -> dict[str, str]:
    """Map tensors that a stock loader would not take under the model's own names → the names under which it does."""
    parts = fused_of(model)
    layers = {*source.specs, *source.plain}
    named = {tensor for tensor in source.tensors if tensor.rpartition(".")[0] not in layers}
    own = {parts.get(n, n) for n in (*named, *(f"{name}.{VALUES}" for name in layers))} & fused_state(model).keys()
    wrong = misread(model, sorted(own))
    stored = stored_names(model) if wrong else {}
    found = {name: stored[name][0] for name in wrong if len(stored[name]) == 1}
    read = loaded_as(model, found.values())
    left = [name for name in wrong if name not in found or read[found[name]] != (name,)]
    if left:
        raise PlanError(
            f"{folder} ({type(model).__name__}): stock loaders take {min(left)} and {len(left) - 1} more of the model's tensors "
            "apart, which this export does not follow: load it with armor_recipes.load, call "
            "armor_recipes.integrations.dense.to_dense and save it with save_pretrained"
        )
    return found


def _linears(folder: Path) -> frozenset[str]:
    """Full names of the linear layers, from config.json alone: embeddings have two-dimensional weights, too."""
    model = meta_model(open_model(ModelSpec(id=str(folder)), device=torch.device("cpu"), compressed=True))
    linears = frozenset(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    names = stored_names(model)
    renamed = sorted(name for name in linears if names[f"{name}.weight"] != (f"{name}.weight",))
    if renamed:
        there = ", ".join(names[f"{renamed[0]}.weight"]) or "parts of other tensors"
        raise PlanError(
            f"{folder} ({type(model).__name__}): {len(renamed)} linear layers lie in its files under other names than in the model "
            f"({renamed[0]}.weight as {there}), which the packed layout cannot follow yet"
        )
    return linears


def _ignored(quantization: dict[str, object]) -> list[str]:
    sparsity = quantization.get("sparsity_config")
    ignore = sparsity.get("ignore") if isinstance(sparsity, dict) and sparsity else quantization.get("ignore")
    return [name for name in ignore if isinstance(name, str)] if isinstance(ignore, list) else []
