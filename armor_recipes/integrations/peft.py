"""peft on packed layers: adapters beside a layer train as on any other; what needs the weight itself is refused.

`weight` of an ARMOR layer holds packed values, that of a plain quantised one is a copy. To merge into them, or to start an adapter
from them, would end in torch's errors
about shapes, half-way through a model, or in wrong numbers (KaSA, RoAd merged, `target_parameters`). Importing this module wraps
the functions of peft by which adapters are added and merged, so that they refuse before anything is changed. A function that
another version of peft does not have is left out.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import wraps
from types import ModuleType
from typing import Any

from torch import nn

from armor_recipes.errors import PlanError
from armor_recipes.integrations.plain import PlainLinear
from armor_recipes.runtime.linear import ArmorLinear

#: Adapters that use a layer's output, input and sizes alone, where a layer's values are floats; tried with peft 0.18 and 0.21.
#: (BOFT does in 0.21, and not in 0.18.)
_BESIDE = frozenset(
    {"LORA", "ADALORA", "XLORA", "BEFT", "C3A", "FOURIERFT", "GRALORA", "IA3", "LILY", "MISS", "OFT", "PVERA"}
    | {"RANDLORA", "ROAD", "UNILORA", "VBLORA", "VERA", "WAVEFT"}
)
#: Fields of these that name a start or a variant, and the values that are of that kind, too. Of others peft reads the weight.
_STARTS: dict[str, tuple[object, ...]] = {
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),
    "init_weights": (True, False, None, "xavier_uniform", "kaiming_uniform", "gaussian", "mini"),
}
_VARIANTS = frozenset(
    ["use_qalora", "alora_invocation_tokens", "arrow_config", "monteclora_config", "velora_config", "use_bdlora"]
)
_READING_VARIANTS = frozenset({"use_dora", "kasa_config"})
"""In versions of peft whose fields do not say that they are variants."""
#: What makes parameters, or tensors, in the dtype of `weight`, which is that of the integers where the core is quantised.
_FLOATS_ONLY = frozenset({"UNILORA", "orthogonal", "velora_config", "use_bdlora"})


#: Layers whose parameters are packed tensors.
_PACKED = (ArmorLinear, PlainLinear)
_Packed = ArmorLinear | PlainLinear


def _refuse_merge(layers: dict[str, _Packed]) -> None:
    for name, layer in layers.items():
        raise _needs_weight(name, layer, "merging an adapter into it")


def _refuse_reading(layers: dict[str, _Packed], config: Any) -> None:
    """Raise PlanError if this adapter reads the weight of one of the layers that it is meant for."""
    for name, layer in layers.items():
        for word in _reads(config, floats=layer.weight.is_floating_point()):
            raise _needs_weight(name, layer, f"this adapter ({word})")


def _needs_weight(name: str, layer: _Packed, what: str) -> PlanError:
    armor = isinstance(layer, ArmorLinear)
    kind, way = (
        ("an ARMOR", "make the model dense first by armor_recipes.to_dense(model), or ")
        if armor
        else ("a quantised", "")
    )
    return PlanError(
        f"{name} is {kind} layer, whose weight is packed, and {what} needs the weight itself. Nothing was changed: {way}write a "
        "dense folder by `armor export FOLDER OUT --to dense` and load that; plain LoRA trains without"
    )


def _reads(config: Any, *, floats: bool) -> Iterator[str]:
    """What of an adapter's configuration reads the weight, in words."""
    kind = getattr(config, "peft_type", None)
    kind = str(getattr(kind, "value", kind))
    if kind not in _BESIDE or (kind in _FLOATS_ONLY and not floats):
        yield kind
    for field, starts in _STARTS.items():
        start = getattr(config, field, None)
        if start not in starts or (start in _FLOATS_ONLY and not floats):
            yield f"{field}={start!r}"
    declared = {field.name for field in dataclasses.fields(config) if field.metadata.get("is_lora_variant")}
    for field in sorted(declared | _READING_VARIANTS):
        if getattr(config, field, None) and (field not in _VARIANTS or (field in _FLOATS_ONLY and not floats)):
            yield field


def _packed_layers(model: nn.Module) -> dict[str, _Packed]:
    """ARMOR and quantised layers by name, that of the outermost adapter where there are some around it."""
    found: dict[str, _Packed] = {}
    seen: set[_Packed] = set()
    for name, module in model.named_modules():
        base: Any = module
        while hasattr(base, "base_layer"):
            base = base.base_layer
        if isinstance(base, _PACKED) and base not in seen:
            found[name] = base
            seen.add(base)
    return found


def _targeted(tuner: Any, model: nn.Module, config: Any, *, by_name: bool) -> dict[str, _Packed]:
    """The packed layers that a configuration names; all of them where that cannot be told."""
    layers = _packed_layers(model)
    if not layers or not by_name:
        return layers
    try:
        matches = _matcher(tuner, model, config)
        return {name: layer for name, layer in layers.items() if matches(name)}
    except Exception:  # another version of peft, or a configuration that peft is about to refuse
        return layers


def _matcher(tuner: Any, model: nn.Module, config: Any) -> Callable[[str], bool]:
    """As peft does it, on a copy: `inject_adapter` completes the configuration first."""
    utils = importlib.import_module("peft.tuners.tuners_utils")
    config = copy.copy(config)
    if config.target_modules is None:
        config = tuner._prepare_adapter_config(config, tuner.get_model_config(model))
    config = utils._maybe_include_all_linear_layers(config, model)
    return lambda name: bool(tuner._check_target_module_exists(config, name))


def _refuse_values(model: nn.Module, config: Any) -> None:
    """Raise PlanError if a layer's parameters are to be adapted, or trained in a copy, as such."""
    parameters = tuple(getattr(config, "target_parameters", None) or ())
    copied = tuple(getattr(config, "modules_to_save", None) or ())
    for name, layer in _packed_layers(model).items():
        keys = [f".{name}.{parameter}" for parameter, _ in layer.named_parameters(recurse=False)]
        if any(key.endswith(f".{target}") for key in keys for target in parameters):
            raise _needs_weight(name, layer, "target_parameters")
        if name.endswith(copied):
            raise _needs_weight(name, layer, "training it as a whole (modules_to_save)")


def _check_adapter(tuner: Any, model: nn.Module, config: Any, *, by_name: bool = True) -> None:
    _refuse_reading(_targeted(tuner, model, config, by_name=by_name), config)
    _refuse_values(model, config)


def _before_adding(inject: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(inject)
    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **options: Any) -> Any:
        _check_adapter(self, model, self.peft_config[adapter_name], by_name=options.get("state_dict") is None)
        return inject(self, model, adapter_name, *args, **options)

    return inject_adapter


def _before_preparing(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """Some adapters decompose weights in this hook, which runs before `inject_adapter`."""

    @wraps(prepare)
    def pre_injection_hook(self: Any, model: nn.Module, config: Any, *args: Any, **options: Any) -> Any:
        _check_adapter(self, model, config)
        return prepare(self, model, config, *args, **options)

    return pre_injection_hook


def _before_measuring(preprocess: Callable[..., Any]) -> Callable[..., Any]:
    """What comes before CorDA's and LoRA-GA's start: long computations for nothing."""

    @wraps(preprocess)
    def preprocess_checked(model: nn.Module, lora_config: Any, *args: Any, **options: Any) -> Any:
        lora = importlib.import_module("peft.tuners.lora").LoraModel
        _check_adapter(lora, model, lora_config, by_name=getattr(lora_config, "target_modules", None) is not None)
        return preprocess(model, lora_config, *args, **options)

    return preprocess_checked


def _before_merging(merge: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(merge)
    def merge_checked(self: Any, *args: Any, **options: Any) -> Any:
        _refuse_merge(_adapted(self.model))
        return merge(self, *args, **options)

    return merge_checked


def _before_unloading(unload: Callable[..., Any]) -> Callable[..., Any]:
    """To take adapters off, unmerged, needs no weight."""

    @wraps(unload)
    def unload_and_optionally_merge(self: Any, merge: bool = True, *args: Any, **options: Any) -> Any:
        if merge:
            _refuse_merge(_adapted(self.model))
        return unload(self, merge, *args, **options)

    return unload_and_optionally_merge


def _before_merging_one(merge: Callable[..., Any]) -> Callable[..., Any]:
    """diffusers, for one, merges layer by layer."""

    @wraps(merge)
    def merge_layer(self: Any, *args: Any, **options: Any) -> Any:
        base = self.get_base_layer()
        if isinstance(base, _PACKED):
            _refuse_merge({getattr(base, "label", "") or "the layer": base})
        return merge(self, *args, **options)

    return merge_layer


def _adapted(model: nn.Module) -> dict[str, _Packed]:
    return {name: layer for name, layer in _packed_layers(model).items() if model.get_submodule(name) is not layer}


_OF_TUNERS = {
    "_pre_injection_hook": _before_preparing,
    "inject_adapter": _before_adding,
    "merge_adapter": _before_merging,
    "_unload_and_optionally_merge": _before_unloading,
}
_OF_LAYERS = {"merge": _before_merging_one}
_OF_MODULES = {"preprocess_corda": _before_measuring, "preprocess_loraga": _before_measuring}


def _wrap(owner: type | ModuleType, wrappers: Mapping[str, Callable[..., Callable[..., Any]]]) -> None:
    for name, wrapper in wrappers.items():
        found = vars(owner).get(name)
        if callable(found):
            setattr(owner, name, wrapper(found))


def _with_subclasses(cls: type | None) -> set[type]:
    return set() if cls is None else {cls}.union(*map(_with_subclasses, cls.__subclasses__()))


def register() -> None:
    """Wrap peft's functions. Importing this module does it."""
    utils = importlib.import_module("peft.tuners.tuners_utils")
    for tuner in _with_subclasses(getattr(utils, "BaseTuner", None)):
        _wrap(tuner, _OF_TUNERS)
    for layer in _with_subclasses(getattr(utils, "BaseTunerLayer", None)):
        _wrap(layer, _OF_LAYERS)
    for name in ("peft", "peft.tuners", "peft.tuners.lora", "peft.tuners.lora.corda", "peft.tuners.lora.loraga"):
        with suppress(ImportError):
            _wrap(importlib.import_module(name), _OF_MODULES)


register()
