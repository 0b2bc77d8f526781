"""Which of llm-compressor's modifiers may stand beside ours in a recipe. What was measured to go wrong is refused before it runs.

Figures are perplexities of the embedded model on held-out text, blocks of 32: dense 38.84, ARMOR 39.39.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from armor_recipes.checkpoint.quantized import FORMATS, Scheme
from armor_recipes.errors import PlanError, UnfitError
from armor_recipes.integrations.oneshot.cores import core_scheme
from armor_recipes.modifiers.base import ModuleShape

_SMOOTHING = ("SmoothQuantModifier", "LogarithmicEqualizationModifier", "AWQModifier")
_IN_ONE_PIPELINE = (
    "what {other} sees of a calibration input in a joint pipeline is from before {own} changed the layer, or the other way round "
    '(measured with GPTQModifier: perplexity 653 where 39 is right, and no error): leave `pipeline` at "independent", in which '
    "each modifier is calibrated on what those before it made"
)
_SMOOTHED_AFTER = (
    "{other} after {own} scales the core in the place of the weight (measured with SmoothQuantModifier: perplexity 40.3 where "
    "39.3 is right): put it before {own}"
)
_GPTQ = (
    "{other} after {own} moves rounding errors into entries that 2:4 has taken away (measured: in 9.6 % of all groups, which "
    "are no 2:4 core any more, and perplexity 43.9 from 39.4): take QuantizationModifier, or quantise the core with armor-apply, "
    "which solves A and B again; or give {other} other modules"
)
_UNKNOWN = (
    "{other} after {own} changes the core, which has not been tried: put it before {own}, or give it other modules"
)
POOR = (
    "four bits by rounding cost the core much (measured: perplexity 41.5 from 39.4); armor-apply's QuantizationModifier solves A "
    "and B again around it"
)
"""What is said of a 4-bit core."""


def check_alone(own: Any, active: Sequence[Any]) -> None:
    """Raise PlanError where another modifier learns from inputs in the pipeline that `own` runs in, at the same time."""
    others = [m for m in active if m is not own and m.requires_calibration_data]
    if others:
        raise PlanError(_IN_ONE_PIPELINE.format(own=_name(own), other=_name(others[0])))


def check_order(own: Any, recipe: Sequence[Any], taken: Mapping[str, nn.Linear], model: nn.Module) -> list[str]:
    """Raise PlanError where a modifier behind `own` in a recipe would go wrong; returns warnings.

    Args:
        own: one of ours.
        recipe: all modifiers, in their order.
        taken: the modules that become cores, by full name.
        model: in which the others' targets are looked up.
    """
    warnings: list[str] = []
    place = next((place for place, one in enumerate(recipe) if one is own), len(recipe))
    for other in recipe[place + 1 :]:
        kinds = {base.__name__ for base in type(other).__mro__}
        names = _targets(other, model)
        shared = [name for name in names if name in taken]
        if kinds.intersection(_SMOOTHING):
            raise PlanError(_SMOOTHED_AFTER.format(own=_name(own), other=_name(other)))
        if "QuantizationMixin" not in kinds:
            if not names or shared:
                raise PlanError(_UNKNOWN.format(own=_name(own), other=_name(other)))
        elif "QuantizationModifier" in kinds:
            warnings += _check_quantization(other, taken, model)
        elif shared:
            text = _GPTQ if "GPTQModifier" in kinds else _UNKNOWN
            raise PlanError(f"{text.format(own=_name(own), other=_name(other))} (both take {shared[0]})")
        else:
            warnings += _check_quantization(other, taken, model)
    return warnings


def _check_quantization(other: Any, taken: Mapping[str, nn.Linear], model: nn.Module) -> list[str]:
    """Raise PlanError where a quantiser would leave a core, or another layer, with no place in a checkpoint; returns warnings."""
    from compressed_tensors.utils import match_named_modules

    config = other.resolved_config
    if config.kv_cache_scheme is not None:
        raise PlanError(
            f"{_name(other)} also quantises keys and values (kv_cache_scheme), for which a folder written here has no place yet: "
            "leave it out, or run the recipe with armor-apply"
        )
    poor = False
    for scheme in config.config_groups.values():
        for name, module in match_named_modules(model, scheme.targets, config.ignore or ()):
            if name in taken:
                poor |= _core_of(other, scheme, name, taken[name]) == "int4"
            elif isinstance(module, nn.Linear) and Scheme.of(scheme).format not in FORMATS:
                raise PlanError(
                    f"{_name(other)} would store {name} as {Scheme.of(scheme).format}, which is not read here"
                )
    return [f"{_name(other)}: {POOR}"] if poor else []


def _core_of(other: Any, scheme: Any, name: str, linear: nn.Linear) -> str:
    shape = ModuleShape(name, linear.out_features, linear.in_features, linear.weight.itemsize)
    try:
        found = core_scheme(scheme, shape)
    except UnfitError as error:
        raise PlanError(
            f"{_name(other)} would quantise ARMOR's cores: {error}; take W8A16, W8A8, FP8_DYNAMIC or W4A16 with groups that divide "
            "the columns, or quantise the core with armor-apply"
        ) from error
    return "" if found is None else found.core


def _targets(other: Any, model: nn.Module) -> list[str]:
    """Full names of the modules that another modifier takes, where it says so."""
    from compressed_tensors.utils import match_named_modules

    targets = getattr(other, "resolved_targets", None) or getattr(other, "targets", None)
    if not targets:
        return []
    return [name for name, _ in match_named_modules(model, targets, getattr(other, "ignore", None) or ())]


def _name(modifier: Any) -> str:
    return type(modifier).__name__
