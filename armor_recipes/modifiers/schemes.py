"""Fields of every modifier that quantises: llm-compressor's `scheme` or `config_groups`, resolved by compressed-tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, TypeAdapter, ValidationError, model_validator
from torch import nn

from armor_recipes.checkpoint.quantized import Scheme, cache_args
from armor_recipes.errors import PlanError
from armor_recipes.modifiers.base import Tap
from armor_recipes.modifiers.observers import observer_of
from armor_recipes.recipe.schema import PRESET, Count, ModifierConfig, SomeTargets, Strict

_OLD_KEYS = ("num_bits", "strategy", "group_size")
_OBSERVED = ("weights", "input", "output")
_ANY_LINEAR = nn.Linear(1, 1, bias=False, device="meta")
"""What stands for a module where a target is a class: a quantising modifier takes linear modules alone."""

Observer = Annotated[str, Field(min_length=1)]
_TARGETS: TypeAdapter[tuple[str, ...]] = TypeAdapter(SomeTargets)


def _as_pair(value: object) -> object:
    """`128x128` or a list, as a pair. Raises ValueError for another text."""
    if not isinstance(value, str):
        return tuple(value) if isinstance(value, list) else value
    found = re.fullmatch(r"([0-9]{1,9})x([0-9]{1,9})", value)
    if found is None:
        raise ValueError("is not of the form ROWSxCOLUMNS, such as 128x128, or [128, 128]")
    return int(found[1]), int(found[2])


def _small_letters(value: object) -> object:
    """As compressed-tensors reads its words, in capitals or not."""
    return value.lower() if isinstance(value, str) else value


_AnyCase = BeforeValidator(_small_letters)


class QuantizationArgs(Strict):
    """How one of weights, inputs or outputs is quantised: compressed-tensors' `QuantizationArgs`, with its defaults."""

    num_bits: Annotated[int, Field(ge=1, le=16)] = Field(default=8, title="Bits", description="Of one number.")
    type: Annotated[Literal["int", "float"], _AnyCase] = Field(
        default="int", title="Type", description="`int`, or `float` of as many bits."
    )
    symmetric: bool = Field(default=True, title="Symmetric", description="Whether zero is 0, without a zero point.")
    group_size: Annotated[int, Field(ge=-1)] | None = Field(
        default=None,
        title="Group size",
        description="Columns of the dense weight that have one scale; -1 is a whole row.",
    )
    strategy: Annotated[
        Literal["tensor", "channel", "group", "block", "token", "tensor_group", "attn_head"] | None, _AnyCase
    ] = Field(
        default=None,
        title="Strategy",
        description="What has one scale. Left out: `group` with a group_size, `channel` with -1, else `tensor`.",
    )
    block_structure: Annotated[
        tuple[Count, Count] | None, BeforeValidator(_as_pair, json_schema_input_type=str | tuple[Count, Count] | None)
    ] = Field(default=None, title="Block structure", description="`block`: rows and columns that have one scale.")
    dynamic: Annotated[bool | Literal["local"], _AnyCase] = Field(
        default=False, title="Dynamic", description="Of activations: whether scales are made of each input as it comes."
    )
    actorder: Annotated[Literal["weight", "static", "group", "dynamic"] | bool | None, _AnyCase] = Field(
        default=None, title="Activation order", description="GPTQ's order of columns: `static` (or `weight`), or null."
    )
    scale_dtype: str | None = Field(
        default=None, title="Scale dtype", description="Of stored scales, `torch.uint8` say."
    )
    zp_dtype: str | None = Field(default=None, title="Zero point dtype", description="Of stored zero points.")
    observer: Observer | None = Field(
        default=None,
        title="Observer",
        description="How ranges are found; by default of weights `memoryless_minmax`, else `minmax`.",
    )
    observer_kwargs: dict[str, Any] = Field(
        default_factory=dict, title="Observer arguments", description="Further arguments of the observer."
    )


class SchemeGroup(Strict):
    """What some modules are quantised to: compressed-tensors' `QuantizationScheme`."""

    targets: SomeTargets | None = Field(
        default=None, title="Targets", description="Modules of the group; left out, the modifier's own."
    )
    weights: QuantizationArgs | None = Field(default=None, title="Weights", description="How weights are quantised.")
    input_activations: QuantizationArgs | None = Field(
        default=None, title="Input activations", description="How what comes to a module is quantised; null leaves it."
    )
    output_activations: QuantizationArgs | None = Field(
        default=None, title="Output activations", description="How what a module puts out is quantised; null leaves it."
    )
    format: str | None = Field(
        default=None,
        title="Format",
        description="Of the packed weight; left out, the one that compressed-tensors infers.",
    )

    @property
    def parts(self) -> tuple[QuantizationArgs, ...]:
        """What is quantised of a module."""
        found = (self.weights, self.input_activations, self.output_activations)
        return tuple(args for args in found if args is not None)


class SchemeConfig(ModifierConfig):
    """What modules are quantised to, as a preset or in full."""

    targets: SomeTargets = Field(
        default=("Linear",),
        title="Targets",
        description="Modules to quantise: exact names, `re:` patterns on the full name, or class names such as `Linear`. Groups "
        "may have targets of their own instead.",
    )
    scheme: Annotated[str, Field(min_length=1)] | Annotated[dict[str, SomeTargets], Field(min_length=1)] | None = Field(
        default=None,
        title="Scheme",
        description="A preset of compressed-tensors, in capitals or not (`W4A16`, `W8A8`, `FP8_DYNAMIC`, …), or a mapping from "
        "presets to targets. Either this or `config_groups`.",
    )
    config_groups: Annotated[dict[str, SchemeGroup], Field(min_length=1)] | None = Field(
        default=None,
        title="Config groups",
        description="Schemes in full, by names of one's own: `targets`, `weights`, `input_activations`, `output_activations`, in "
        "compressed-tensors' words. `group_size` counts columns of the dense weight.",
    )
    kv_cache_scheme: QuantizationArgs | None = Field(
        default=None,
        title="KV cache",
        description="How keys and values are quantised on their way into the cache: `num_bits`, `type` and so on, `strategy: "
        "tensor` or `attn_head`. With `scheme` or `config_groups`, or alone.",
    )
    weight_observer: Observer | None = Field(
        default=None, title="Weight observer", description="The `observer` of all weights that name none."
    )
    input_observer: Observer | None = Field(
        default=None,
        title="Input observer",
        description="The `observer` of all static input activations that name none.",
    )
    output_observer: Observer | None = Field(
        default=None,
        title="Output observer",
        description="The `observer` of all static output activations that name none.",
    )
    observer: dict[str, Observer] | None = Field(
        default=None,
        title="Observers",
        description="The three at once: a mapping of `weights`, `input` and `output`.",
    )
    bypass_divisibility_checks: bool = Field(
        default=False,
        title="Bypass checks",
        description="llm-compressor's way around its check that groups are whole. No observer, there or here, cuts a group "
        "off at the end of a row, so a plan refuses what does not divide either way, and this changes nothing.",
    )

    @model_validator(mode="before")
    @classmethod
    def _plain_words(cls, data: Any) -> Any:
        """Refuse the spelling of releases before, and give groups' targets to the modifier."""
        if not isinstance(data, Mapping):
            return data
        old = {key: data[key] for key in _OLD_KEYS if key in data}
        if old:
            raise ValueError(_new_spelling(old))
        own = _own_targets(data)
        if own and data.get("targets", "Linear") in ("Linear", ["Linear"], ("Linear",)):
            return {**data, "targets": own}
        if own:
            raise ValueError("groups with `targets` of their own and `targets` beside them: leave out one or the other")
        return data

    @model_validator(mode="after")
    def _check_schemes(self) -> Self:
        self._check_cache()
        alone = self.kv_cache_scheme is not None and not self.for_weights
        if (self.scheme is None) == (self.config_groups is None) and not alone:
            found = "both are given" if self.scheme is not None else "neither is given"
            raise ValueError(
                f"what to quantise to is one of `scheme` (a preset, `scheme: W4A16`) and `config_groups`: {found}"
            )
        for name, group in (self.config_groups or {}).items():
            if group.weights is None:
                raise ValueError(f"config_groups.{name} has no `weights`: a module is quantised with its weight")
            if group.weights.strategy == "attn_head":
                raise ValueError(f"config_groups.{name}: weights have no heads; `attn_head` is for keys and values")
        self._check_observers()
        self._check_presets()
        try:
            _ = self.schemes
        except PlanError as error:
            raise ValueError(str(error)) from error
        return self

    def _check_cache(self) -> None:
        """Raise ValueError for a cache that compressed-tensors does not read."""
        try:
            _ = self.cache
        except (ValueError, NotImplementedError) as error:
            raise ValueError(f"kv_cache_scheme: compressed-tensors refuses it: {error}") from error

    @property
    def for_weights(self) -> bool:
        """Whether there is any scheme of weights, and not of keys and values alone."""
        return self.scheme is not None or bool(self.config_groups)

    @property
    def cache(self) -> str | None:
        """How keys and values are quantised, as JSON of compressed-tensors' args."""
        if self.kv_cache_scheme is None:
            return None
        defaults = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
        fields = {**defaults, **_with_observer(self.kv_cache_scheme.model_dump(exclude_unset=True))}
        strategy = cache_args(json.dumps(fields)).strategy
        return json.dumps({**fields, "strategy": getattr(strategy, "value", strategy)}, sort_keys=True)

    def args_of(self, tap: Tap) -> Any:
        """compressed-tensors' args of what a module puts out, or of keys or values."""
        if tap.side != "output":
            return None if self.cache is None else cache_args(self.cache)
        scheme = self.scheme_of(tap.module)
        return None if scheme is None else scheme.args.output_activations

    def _check_observers(self) -> None:
        """Raise ValueError for observers that are not here, and for two ways of naming them at once."""
        single = (self.weight_observer, self.input_observer, self.output_observer)
        if self.observer is not None and any(single):
            raise ValueError(
                "`observer` names those of weights, input and output: leave it out, or weight_observer and the like"
            )
        for key in self.observer or {}:
            if key not in _OBSERVED:
                raise ValueError(f"`observer` has the keys {', '.join(_OBSERVED)}, not {key}")
        groups = [part for group in (self.config_groups or {}).values() for part in group.parts]
        named = [(args.observer, args.observer_kwargs) for args in groups if args.observer is not None]
        for name, kwargs in [*named, *((one, {}) for one in (*single, *(self.observer or {}).values()) if one)]:
            try:
                observer_of(name, kwargs)
            except PlanError as error:
                raise ValueError(str(error)) from error

    def _check_presets(self) -> None:
        from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, is_preset_scheme

        for name in self._presets:
            if not is_preset_scheme(name) or not PRESET_SCHEMES[name.upper()].get("weights"):
                known = ", ".join(sorted(key for key, value in PRESET_SCHEMES.items() if value))
                raise ValueError(f"scheme {name} is no preset of the installed compressed-tensors; it has {known}")

    @property
    def _presets(self) -> tuple[str, ...]:
        """Names of presets that are asked for."""
        return (self.scheme,) if isinstance(self.scheme, str) else tuple(self.scheme or ())

    @property
    def schemes(self) -> tuple[Any, ...]:
        """compressed-tensors' `QuantizationScheme` for each group, in order, with the targets that it takes. Raises PlanError."""
        from compressed_tensors.quantization import QuantizationScheme
        from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme

        if isinstance(self.scheme, str):
            return (self._observed(preset_name_to_scheme(self.scheme, list(self.targets))),)
        if self.scheme is not None:
            chosen = [preset_name_to_scheme(name, list(targets)) for name, targets in self.scheme.items()]
            return tuple(map(self._observed, chosen))
        found = []
        for name, group in (self.config_groups or {}).items():
            fields = _with_observers(group.model_dump(exclude_unset=True))
            try:
                scheme = QuantizationScheme(**{**fields, "targets": list(group.targets or self.targets)})
            except (ValueError, NotImplementedError) as error:
                raise PlanError(f"config_groups.{name}: compressed-tensors refuses it: {_reasons(error)}") from error
            found.append(self._observed(scheme))
        return tuple(found)

    def scheme_of(self, name: str, module: nn.Module = _ANY_LINEAR) -> Scheme | None:
        """The scheme of a linear module, None where no group takes it: the first of `matching`. Raises PlanError."""
        return next(iter(self.matching(name, module)), None)

    def matching(self, name: str, module: nn.Module = _ANY_LINEAR) -> tuple[Scheme, ...]:
        """The different schemes of all groups that match a linear module, that which counts first, in the order in which
        compressed-tensors takes them: a name before a pattern before a class, then by the target's letters, and of groups with the
        same target the last. Raises PlanError.
        """
        from compressed_tensors.utils.match import match_targets

        found = (self._by_target[target] for target in match_targets(name, module, self._by_target))
        return tuple(dict.fromkeys(scheme for schemes in found for scheme in reversed(schemes)))

    @cached_property
    def _by_target(self) -> dict[str, list[Scheme]]:
        """The schemes of each target, made once: a mixture of experts asks for them ten thousands of times."""
        found: dict[str, list[Scheme]] = {}
        for scheme in self.schemes:
            for target in scheme.targets:
                found.setdefault(self._pattern(target), []).append(Scheme.of(scheme))
        return found

    def _pattern(self, target: str) -> str:
        """What compressed-tensors knows: of a preset, which has chosen the modifier's modules, any name. Raises PlanError."""
        if not target.startswith(PRESET):
            return target
        if len(self.schemes) > 1:
            raise PlanError(
                f"{target!r} among the targets of one of {len(self.schemes)} groups does not tell whose its modules are: name them "
                "by patterns, or give each group a modifier of its own"
            )
        return "re:.*"

    def _observed(self, scheme: Any) -> Any:
        """The scheme with the observers that the modifier names for all."""
        named = self.observer or {}
        wanted = {
            "weights": self.weight_observer or named.get("weights"),
            "input_activations": self.input_observer or named.get("input"),
            "output_activations": self.output_observer or named.get("output"),
        }
        for part, observer in wanted.items():
            args = getattr(scheme, part)
            if observer is not None and args is not None and args.dynamic is False:
                setattr(scheme, part, args.model_copy(update={"observer": observer}))
        return scheme


def _reasons(error: Exception) -> str:
    """What compressed-tensors does not take, on one line: of each field the last reason, where several types were tried."""
    if not isinstance(error, ValidationError):
        return str(error)
    found: dict[str, str] = {}
    for each in error.errors():
        field = ".".join(part for part in map(str, each["loc"]) if part.isidentifier())
        found[field] = each["msg"].removeprefix("Value error, ").splitlines()[0]
    return "; ".join(f"{field}: {text}".removeprefix(": ") for field, text in found.items())


def _with_observers(fields: dict[str, Any]) -> dict[str, Any]:
    """A group's fields with the observer that llm-compressor gives activations; older compressed-tensors would put in another."""
    for part in ("input_activations", "output_activations"):
        if fields.get(part) is not None:
            fields[part] = _with_observer(fields[part])
    return fields


def _with_observer(args: dict[str, Any]) -> dict[str, Any]:
    return args if args.get("dynamic") is True or args.get("observer") else {**args, "observer": "minmax"}


def _own_targets(data: Mapping[str, Any]) -> list[str]:
    """Targets of the groups, each once; none where a group takes the modifier's, or has some that will be refused as its own."""
    if isinstance(data.get("scheme"), Mapping):
        parts = list(data["scheme"].values())
    else:
        groups = data.get("config_groups")
        found = groups.values() if isinstance(groups, Mapping) else ()
        parts = [group.get("targets") if isinstance(group, Mapping) else None for group in found]
    if not parts or not all(parts):
        return []
    try:
        known = [_TARGETS.validate_python(part) for part in parts]
    except ValidationError:
        return []
    return list(dict.fromkeys(target for part in known for target in part))


def _new_spelling(old: Mapping[str, object]) -> str:
    """What to write in the place of `num_bits`, `strategy` and `group_size` on the modifier itself."""
    size = old.get("group_size")
    args: dict[str, object] = {"num_bits": old.get("num_bits", 8)}
    args |= {"group_size": 2 * size} if isinstance(size, int) else {"strategy": "channel"}
    inner = ", ".join(f"{key}: {value}" for key, value in args.items())
    counted = (
        " (group_size counts columns of the dense weight, two for each kept value)" if "group_size" in args else ""
    )
    return (
        f"{', '.join(old)} on the modifier itself is the spelling of an earlier release; in its place write "
        f"`config_groups: {{core: {{weights: {{{inner}}}}}}}`{counted}"
    )
