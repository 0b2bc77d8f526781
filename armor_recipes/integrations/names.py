"""Under which names a model's tensors lie in files: transformers renames, splits and merges some as it loads and saves."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from armor_recipes.checkpoint.config import OUTPUT_FACTOR, VALUES
from armor_recipes.checkpoint.quantized import WEIGHT_PACKED
from armor_recipes.errors import VerificationError
from armor_recipes.model.forms import fused_keys, fused_state, layouts


def stored_names(model: PreTrainedModel) -> dict[str, tuple[str, ...]]:
    """Map each tensor of the model, without linear forms → the names under which saving writes it: usually one, its own."""
    state = fused_state(model)
    if _reverted(model, state) == state.keys():
        return {name: (name,) for name in state}
    return {name: tuple(sorted(_reverted(model, {name: tensor}))) for name, tensor in state.items()}


def loaded_as(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Map each name in files → the tensors of the model, without linear forms, that loading makes of it; none for one of no module.

    The model may be on the meta device.
    """
    return {name: targets for name, targets, _ in _loads(model, names)}


def origins(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Map each tensor of `model.state_dict()` → the names in files that it is loaded from; none where the files hold none."""
    made: dict[str, list[str]] = {}
    for name, targets in loaded_as(model, names).items():
        for target in targets:
            made.setdefault(target, []).append(name)
    fused = fused_of(model)
    return {name: tuple(made.get(fused.get(name, name), ())) for name in model.state_dict()}


def fused_of(model: PreTrainedModel) -> dict[str, str]:
    """Map each tensor of a linear form → the fused parameter that it is a part of."""
    return {
        f"{name}.{part}": f"{name}.{piece.parameter}"
        for name, layout in layouts(model).items()
        for part, piece in layout.parts.items()
    }


def misread(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Those of the own tensors, without linear forms, that loading would not take as they are from files under their names."""
    return [name for name, targets, converted in _loads(model, names) if targets != (name,) or converted]


def left_behind(
    model: PreTrainedModel, written: Collection[str], stored: Iterable[str], *, packed: bool
) -> tuple[str, ...]:
    """Names of the source's files whose tensors no written one holds, sorted.

    Tensors of no module: further layers, heads or towers that the architecture's class leaves alone; a tied weight that is stored
    twice; what the architecture never saves.

    Args:
        model: as it was written, or on the meta device.
        written: names in the folder that was written.
        stored: names in the source's files.
        packed: whether the folder goes by the model's own names.

    Raises:
        VerificationError: for a tensor of the files of which a part was written, and a part was not.
    """
    if packed:
        parts = fused_of(model)
        there = {f"{n.removesuffix(WEIGHT_PACKED)}{VALUES}" for n in written if n.endswith(f".{WEIGHT_PACKED}")}.union(
            written
        )
        missing = {fused for part, fused in parts.items() if part not in there}
        held = ({parts.get(name, name) for name in there} | there | _packed_with(model, written)) - missing
    else:
        held = {target for targets in loaded_as(model, written).values() for target in targets}
    left = []
    for name, targets in loaded_as(model, stored).items():
        found = [target in held for target in targets]
        if name in written or (found and all(found)):
            continue
        if any(found):
            lost = targets[found.index(False)]
            raise VerificationError(f"{lost}, a part of {name} in the model's files, was not written: this is a bug")
        left.append(name)
    return tuple(sorted(left))


def _packed_with(model: PreTrainedModel, written: Collection[str]) -> set[str]:
    """Weights of the model that are tied to one that was written packed: it stands for them, and files have no place for theirs."""
    return {
        use
        for use, source in model.all_tied_weights_keys.items()
        if f"{source.removesuffix(VALUES)}{OUTPUT_FACTOR}" in written
    }


def _loads(model: PreTrainedModel, names: Iterable[str]) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """Yield each name, what is loaded from it, and whether values of the model's own shape are converted, as
    `convert_and_load_state_dict_in_model` does.
    """
    state = dict.fromkeys(fused_keys(model), True)
    conversions = get_model_conversion_mapping(model)
    renamings = [one for one in conversions if isinstance(one, WeightRenaming)]
    converters = [one for one in conversions if isinstance(one, WeightConverter)]
    by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if renamed not in state and name in state:
            renamed, pattern = name, None
        every = [renamed]
        if pattern is not None:
            targets = by_pattern[pattern].target_patterns
            every = [renamed.replace(targets[0], target) for target in targets]
        converted = pattern is not None and not _leaves_own_shapes(by_pattern[pattern])
        yield name, tuple(target for target in every if target in state), converted


def _leaves_own_shapes(converter: WeightConverter) -> bool:
    """Whether what has the model's own shape is taken as it is: experts that some files hold transposed (Qwen3-VL's)."""
    return all(getattr(operation, "check_dims", False) for operation in converter.operations)


def _reverted(model: PreTrainedModel, state: Mapping[str, torch.Tensor]) -> set[str]:
    """Names after transformers' reversal of its conversions; empty where it fails (a tensor that it splits oddly)."""
    try:
        return set(revert_weight_conversion(model, dict(state)))
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError, AttributeError):
        return set()
