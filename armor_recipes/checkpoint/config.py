"""`quantization_config`, in compressed-tensors' own schema.

One config group for every distinct block size, core type and group size, `format: sparse-24-bitmask`, with the full names
of its modules as targets. `weights` is what the schema asks for; of a quantised core it says bits, strategy and group size.
What else a loader has to know before it reads tensors is the block size, the core type, who shares an input factor and whose
weight is tied, and `weights.observer_kwargs` is the one free field that compressed-tensors keeps when it writes a config again:
unknown keys are dropped, and `block_structure` is accepted with one strategy only, which a quantised core could not use.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from armor_recipes.checkpoint.header import shown
from armor_recipes.checkpoint.packing import GROUP_STEP, KEPT_PER_VALUE, PackedLinear
from armor_recipes.checkpoint.quantized import DENSE, FORMATS, MIXED, Scheme, cache_tensors
from armor_recipes.errors import CheckpointError

FORMAT = "sparse-24-bitmask"
QUANT_METHOD = "compressed-tensors"
FORMAT_VERSION = 4
"""Of the layout, the latest that is read; see docs/checkpoint.md for what later releases will read."""
_VERSION_WITHOUT_ACTIVATIONS, _VERSION_WITHOUT_TIES = 3, 2
SCHEMA_VERSION = "0.17.0"
"""The oldest compressed-tensors whose schema reads this: a constant, so that equal runs give equal bytes."""
BLOCK_SIZE_KEY, CORE_KEY, INPUT_FACTOR_KEY = "armor_block_size", "armor_core", "armor_input_factor"
TIED_KEY = "armor_tied_weights"
CORE_TYPES = tuple(KEPT_PER_VALUE)
"""What the kept values of a core can be. `float`: numbers in the checkpoint's float dtype, which the tensor itself tells.
`int8`, `int4`: integers, with scales in that dtype; `fp8`: float8_e4m3fn, with the same."""
CORE_BITS = {"int8": 8, "int4": 4, "fp8": 8}
_NUMBERS = {"int": "int8", "float": "fp8"}
"""What entries of Bx are rounded to, by the schema's type of 8 bits."""
VALUES, BITMASK, OUTPUT_FACTOR, INPUT_FACTOR, SCALE = "weight", "bitmask", "armor_a", "armor_b", "weight_scale"
ROTATIONS = "transform_config"
_IN_WEIGHTS = ("weight_input", "weight_output")
TENSOR_NAMES = (VALUES, BITMASK, OUTPUT_FACTOR, INPUT_FACTOR)
"""Names of a layer's tensors after its module's name; a quantised core has `SCALE` besides. The values are called `weight`,
in their packed shape, on purpose: a loader that does not know the format meets a size mismatch, where it would replace a
missing `weight` by a random one."""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What config.json says of one layer."""

    block_size: tuple[int, int]
    """`(b_o, b_i)`."""
    core: str = "float"
    """One of `CORE_TYPES`."""
    input_factor: str | None = None
    """Full name of the module whose B this layer uses; None where it has its own."""
    group_size: int | None = None
    """Kept values of a row that have one scale; None for a whole row, and where the core is not quantised."""
    tied_to: str | None = None
    """Full name of the module whose weight this layer has, under which the tensors of both are stored; None where it has its
    own."""
    activations: str | None = None
    """What Bx is rounded to as the layer runs, with one scale a token: `int8` or `fp8`; None leaves it."""

    @classmethod
    def of(cls, layer: PackedLinear) -> LayerSpec:
        """Of a layer with a B and a weight of its own."""
        return cls(layer.block_size, layer.core, None, layer.group_size, None, layer.activations)


@dataclass(frozen=True, slots=True)
class PackedShapes:
    """The shapes of a layer's tensors on disk, from its weight's shape `(O, I)` and what config.json says of it."""

    values: tuple[int, ...]
    bitmask: tuple[int, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]
    scale: tuple[int, ...] | None = None

    @classmethod
    def of(cls, shape: tuple[int, int], spec: LayerSpec, *, name: str = "this layer") -> PackedShapes:
        """Compute them.

        Raises:
            CheckpointError: where the block size does not divide the weight, or 8 its columns (16 for int4), or the group size
                the kept values of a row.
        """
        (rows, columns), block_size = shape, spec.block_size
        b_o, b_i = block_size
        if not rows or not columns or rows % b_o or columns % b_i or columns % 8:
            raise CheckpointError(
                f"{name}: {block_size=} does not divide the weight's shape {shape}, or it is empty, or its {columns} "
                "columns are no multiple of 8: config.json does not belong to this model"
            )
        kept, stored = columns // 2, KEPT_PER_VALUE[spec.core]
        group = spec.group_size or kept
        if kept % stored or kept % group:
            raise CheckpointError(
                f"{name}: the {kept} kept values of a row are no whole groups of {group}, or no multiple of the {stored} that one "
                f"number of an {spec.core} core holds: config.json does not belong to this model"
            )
        factors = (rows // b_o, b_o, b_o), (columns // b_i, b_i, b_i)
        scale = None if spec.core == "float" else (rows, kept // group)
        return cls((rows, kept // stored), (rows, columns // 8), *factors, scale)


def named_tensors(layer: PackedLinear) -> dict[str, Tensor]:
    """A layer's tensors by their names after the module's."""
    tensors = dict(zip(TENSOR_NAMES, (layer.values, layer.bitmask, layer.a, layer.b), strict=True))
    return tensors if layer.scale is None else {**tensors, SCALE: layer.scale}


def tensor_names(core: str) -> tuple[str, ...]:
    """The names of a layer's tensors after the module's, by core type."""
    return TENSOR_NAMES if core == "float" else (*TENSOR_NAMES, SCALE)


def quantization_config(
    layers: Mapping[str, PackedLinear | LayerSpec],
    ignore: Sequence[str],
    shared: Mapping[str, str] | None = None,
    tied: Mapping[str, str] | None = None,
    quantized: Mapping[str, Scheme] | None = None,
    cache: str | None = None,
) -> dict[str, Any]:
    """Describe these layers, with keys and an order that depend on nothing but the arguments.

    Args:
        layers: full module name → packed layer, or block size, core type and group size of one.
        ignore: full names of the linear modules left dense.
        shared: full name of a module without a B of its own → of the module of the same group whose B it uses.
        tied: full name of a further module that has the weight of a layer, and is none of `layers` → of that layer.
        quantized: full module name → what a plain layer is quantised to. There is a layer here or in `layers`, or `cache`.
        cache: how keys and values are quantised, as JSON of compressed-tensors' args.
    """
    groups: dict[LayerSpec, list[str]] = defaultdict(list)
    stored, tied = dict(shared or {}), tied or {}
    for name, layer in {**layers, **{use: layers[owner] for use, owner in tied.items()}}.items():
        _check_target(name)
        groups[LayerSpec(layer.block_size, layer.core, None, layer.group_size, None, layer.activations)].append(name)
    ordered = sorted(
        groups, key=lambda spec: (spec.block_size, spec.core, spec.group_size or 0, spec.activations or "")
    )
    used = stored | {use: stored[owner] for use, owner in tied.items() if owner in stored}
    found = [_group(sorted(groups[spec]), spec, used, tied) for spec in ordered] + _plain_groups(quantized or {})
    formats = {group["format"] for group in found}
    return {
        "config_groups": {f"group_{index}": group for index, group in enumerate(found)},
        "format": MIXED if len(formats) > 1 else formats.pop() if formats else DENSE,
        "global_compression_ratio": None,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None if cache is None else json.loads(cache),
        "quant_method": QUANT_METHOD,
        "quantization_status": "compressed",
        "version": SCHEMA_VERSION,
    }


def _plain_groups(quantized: Mapping[str, Scheme]) -> list[dict[str, Any]]:
    """A group for each scheme, in the order of their texts."""
    names: dict[Scheme, list[str]] = defaultdict(list)
    for name, scheme in quantized.items():
        _check_target(name)
        names[scheme].append(name)
    return [scheme.group(sorted(names[scheme])) for scheme in sorted(names, key=lambda scheme: scheme.text)]


def block_size_of(weights: object, *, where: str) -> tuple[int, int]:
    """Read `(b_o, b_i)` from a group's `weights`. Raises `CheckpointError`, starting with `where`, if it has none."""
    value = _observer_kwargs(weights).get(BLOCK_SIZE_KEY)
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(b) is int and b > 0 for b in value):
        raise CheckpointError(
            f"{where}: weights.observer_kwargs.{BLOCK_SIZE_KEY} is {shown(value)}; an ARMOR layer needs [out, in], two "
            "positive integers"
        )
    return value[0], value[1]


def core_of(weights: object, *, where: str) -> str:
    """Read the core type from a group's `weights`; format version 1, which names none, had `float` alone.

    Raises `CheckpointError`, starting with `where`, for a type outside `CORE_TYPES`.
    """
    value = _observer_kwargs(weights).get(CORE_KEY, "float")
    if value not in CORE_TYPES:
        raise CheckpointError(
            f"{where}: weights.observer_kwargs.{CORE_KEY} is {shown(value)}; this release reads {', '.join(CORE_TYPES)}: "
            "use a later one, or a checkpoint with another core"
        )
    return str(value)


def layer_spec_of(weights: object, activations: object = None, *, where: str) -> LayerSpec:
    """Read block size, core type, group size and what Bx is rounded to from a group's `weights` and `input_activations`.

    Raises `CheckpointError`, starting with `where`.
    """
    core, numbers = core_of(weights, where=where), activations_of(activations, where=where)
    if core == "float" and numbers is not None:
        raise CheckpointError(
            f"{where}: input_activations ask for {numbers}, and the core is float: 8-bit activations go with a quantised core"
        )
    group_size = _group_size_of(weights, core, where=where)
    return LayerSpec(block_size_of(weights, where=where), core, None, group_size, None, numbers)


def activations_of(value: object, *, where: str) -> str | None:
    """Read what Bx is rounded to from a group's `input_activations`: `int8`, `fp8`, or None for nothing.

    Raises `CheckpointError`, starting with `where`, for anything but symmetric 8 bits with a dynamic scale for each token.
    """
    if value is None:
        return None
    args = value if isinstance(value, Mapping) else {}
    wanted = {"num_bits": 8, "dynamic": True, "strategy": "token", "symmetric": True}
    numbers = _NUMBERS.get(str(args.get("type")))
    if numbers is None or any(args.get(key) != expected for key, expected in wanted.items()):
        raise CheckpointError(
            f"{where}: input_activations is {shown(value)}; of a core it is null, or 8 bits of type int or float, symmetric, "
            "dynamic, with strategy token"
        )
    return numbers


def _group_size_of(weights: object, core: str, *, where: str) -> int | None:
    """Kept values of a row that have one scale; None for a whole row. Of a float core nothing is asked."""
    if core == "float" or not isinstance(weights, Mapping):
        return None
    bits, strategy, size = (weights.get(key) for key in ("num_bits", "strategy", "group_size"))
    kind = "float" if core == "fp8" else "int"
    if bits != CORE_BITS[core] or weights.get("type") != kind or weights.get("symmetric") is not True:
        raise CheckpointError(
            f"{where}: weights say {shown(bits)} bits, type {shown(weights.get('type'))}, symmetric "
            f"{shown(weights.get('symmetric'))}; an {core} core has {CORE_BITS[core]} bits, type {kind}, symmetric true"
        )
    if strategy == "channel" and size is None:
        return None
    if strategy == "group" and type(size) is int and size > 0 and size % GROUP_STEP == 0:
        return size
    raise CheckpointError(
        f"{where}: weights have strategy {shown(strategy)}, group_size {shown(size)}; a quantised core has strategy channel and no "
        f"group_size, or strategy group and a multiple of {GROUP_STEP}"
    )


def input_factors_of(weights: object, *, targets: Collection[str], where: str) -> dict[str, str]:
    """Map each target without a B of its own → the target whose B it uses, from a group's `weights`.

    Raises:
        CheckpointError: starting with `where`, for names outside `targets`, and for an owner that is a sharer itself.
    """
    return _pairs(weights, INPUT_FACTOR_KEY, "B", targets=targets, where=where)


def tied_weights_of(weights: object, *, targets: Collection[str], where: str) -> dict[str, str]:
    """Map each target without tensors of its own → the target whose weight it has, from a group's `weights`.

    Raises:
        CheckpointError: starting with `where`, for names outside `targets`, for an owner that is tied itself, and for a target that
            does not use the B that its owner uses.
    """
    tied = _pairs(weights, TIED_KEY, "weight", targets=targets, where=where)
    used = input_factors_of(weights, targets=targets, where=where)
    for use, owner in tied.items():
        if used.get(use) != used.get(owner):
            raise CheckpointError(
                f"{where}: {TIED_KEY} gives {shown(use)} the weight of {shown(owner)}, but by {INPUT_FACTOR_KEY} the B of the one "
                "is not that of the other"
            )
    return tied


def _pairs(weights: object, key: str, what: str, *, targets: Collection[str], where: str) -> dict[str, str]:
    """What maps targets of a group to others, of which none is mapped itself."""
    value = _observer_kwargs(weights).get(key, {})
    if not isinstance(value, Mapping) or not all(isinstance(name, str) for pair in value.items() for name in pair):
        raise CheckpointError(f"{where}: {key} is {shown(value)}; it must map module names to module names")
    known = frozenset(targets)
    for sharer, owner in value.items():
        if sharer not in known or owner not in known or owner in value:
            raise CheckpointError(
                f"{where}: {key} lets {shown(sharer)} use the {what} of {shown(owner)}; both must be targets of this "
                f"group, and the second must have a {what} of its own"
            )
    return dict(value)


def version_of(config: object) -> int:
    """The lowest format version that describes a folder, from the `quantization_config` that it was written with, if any."""
    groups = config.get("config_groups") if isinstance(config, Mapping) else None
    found = groups.values() if isinstance(groups, Mapping) else ()
    tied = any(TIED_KEY in _observer_kwargs(g.get("weights")) for g in found if isinstance(g, Mapping))
    if (
        any(_new_in_four(g) for g in found if isinstance(g, Mapping))
        or cache_of(config, where="config.json") is not None
    ):
        return FORMAT_VERSION
    return _VERSION_WITHOUT_ACTIVATIONS if tied else _VERSION_WITHOUT_TIES


def cache_of(config: object, *, where: str) -> str | None:
    """How keys and values are quantised, as JSON of compressed-tensors' args; None where they are not. Raises CheckpointError,
    starting with `where`, for a `kv_cache_scheme` that it does not read.
    """
    value = config.get("kv_cache_scheme") if isinstance(config, Mapping) else None
    if value is None:
        return None
    try:
        text = json.dumps(value, sort_keys=True)
        cache_tensors(text)
    except (ValueError, TypeError, NotImplementedError) as error:
        raise CheckpointError(
            f"{where}: quantization_config.kv_cache_scheme is none that compressed-tensors reads: {error}"
        ) from error
    return text


def rotations_of(config: object) -> dict[str, dict[str, Any]]:
    """The groups of a `quantization_config`'s `transform_config` whose rotations a model makes as it runs, with the places of those
    alone; what is rotated in the weights is no loader's business. Empty where there are none.

    Raises:
        CheckpointError: where it is none that compressed-tensors writes.
    """
    found = config.get(ROTATIONS) if isinstance(config, Mapping) else None
    if not found:
        return {}
    try:
        online = {
            name: {**group, "apply": [place for place in group["apply"] if place["location"] not in _IN_WEIGHTS]}
            for name, group in found["config_groups"].items()
        }
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"config.json: quantization_config.{ROTATIONS} is none that compressed-tensors writes ({error!r})"
        ) from error
    return {name: group for name, group in online.items() if group["apply"]}


def _new_in_four(group: Mapping[str, Any]) -> bool:
    """Whether a release that reads version 3 would run the group's layers otherwise, or not read them."""
    return group.get("input_activations") is not None or _observer_kwargs(group.get("weights")).get(CORE_KEY) == "fp8"


def layer_specs(config: object, *, where: str) -> dict[str, LayerSpec]:
    """Map full module name → what a `quantization_config` says of it, for every ARMOR layer that it names.

    Formats come from a fixed list (so far one): compressed-tensors looks formats up in a registry in which a name such
    as `path.py:name` executes that file, so nothing of a checkpoint reaches it unchecked.

    Raises:
        CheckpointError: if the config is not ours, starting with `where`, the file.
    """
    if not isinstance(config, Mapping) or config.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{where}: no quantization_config with quant_method {QUANT_METHOD!r}: not an ARMOR checkpoint, but dense weights or "
            "another tool's; `armor export FOLDER OUT --to armor` packs weights that are 2:4"
        )
    groups = config.get("config_groups")
    if not groups and rotations_of(config):
        return {}
    alone = groups == {} and cache_of(config, where=where) is not None
    _check_one_of(config, "format", (DENSE,) if alone else (FORMAT, MIXED, *FORMATS), where=where)
    _check_field(config, "quantization_status", "compressed", where=where)
    if alone:
        return {}
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(
            f"{where}: quantization_config.config_groups is {shown(groups)}; it must name at least one group"
        )
    specs: dict[str, LayerSpec] = {}
    for key, group in groups.items():
        place = f"{where}: quantization_config.config_groups.{key}"
        if format_of(group, config) in FORMATS:
            continue
        found = _group_specs(group, where=place)
        twice = sorted(specs.keys() & found.keys())
        if twice:
            raise CheckpointError(f"{place} names {twice[0]}, which another group names, too")
        specs.update(found)
    return specs


def format_of(group: object, config: object) -> object:
    """A group's own format, or that of all."""
    own = group.get("format") if isinstance(group, Mapping) else None
    return own or (config.get("format") if isinstance(config, Mapping) else None)


def _group(targets: list[str], spec: LayerSpec, shared: Mapping[str, str], tied: Mapping[str, str]) -> dict[str, Any]:
    kwargs: dict[str, Any] = {BLOCK_SIZE_KEY: list(spec.block_size), CORE_KEY: spec.core}
    for key, owners in ((INPUT_FACTOR_KEY, shared), (TIED_KEY, tied)):
        named = {name: owners[name] for name in targets if name in owners}
        if named:
            kwargs[key] = named
    return {
        "format": FORMAT,
        "input_activations": _activations(spec.activations),
        "output_activations": None,
        "targets": targets,
        "weights": {
            "dynamic": False,
            "group_size": spec.group_size,
            # int with 16 bits stands for "not quantised": the schema has no 16-bit float. The stored dtype counts.
            "num_bits": CORE_BITS.get(spec.core, 16),
            "observer_kwargs": kwargs,
            "strategy": "tensor" if spec.core == "float" else "channel" if spec.group_size is None else "group",
            "symmetric": True,
            "type": "float" if spec.core == "fp8" else "int",
        },
    }


def _activations(numbers: str | None) -> dict[str, Any] | None:
    if numbers is None:
        return None
    kind = next(kind for kind, name in _NUMBERS.items() if name == numbers)
    return {
        "dynamic": True,
        "group_size": None,
        "num_bits": 8,
        "strategy": "token",
        "symmetric": True,
        "type": kind,
    }


def _group_specs(group: object, *, where: str) -> dict[str, LayerSpec]:
    if not isinstance(group, Mapping):
        raise CheckpointError(f"{where} is {shown(group)}; it must be a mapping")
    _check_field(group, "format", FORMAT, where=where)
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}.targets is {shown(targets)}; it must be a list of full module names")
    for target in targets:
        _check_target(target)
    if len(set(targets)) != len(targets):
        raise CheckpointError(f"{where}.targets names a module twice")
    weights = group.get("weights")
    spec = layer_spec_of(weights, group.get("input_activations"), where=where)
    owners = input_factors_of(weights, targets=targets, where=where)
    tied = tied_weights_of(weights, targets=targets, where=where)
    return {t: replace(spec, input_factor=owners.get(t), tied_to=tied.get(t)) for t in targets}


def _observer_kwargs(weights: object) -> Mapping[str, Any]:
    kwargs = weights.get("observer_kwargs") if isinstance(weights, Mapping) else None
    return kwargs if isinstance(kwargs, Mapping) else {}


def _check_target(name: str) -> None:
    if not name or name.startswith("re:"):
        raise CheckpointError(f"target {shown(name)} is not a full module name; ARMOR groups name every module in full")


def _check_one_of(config: Mapping[str, Any], key: str, known: Collection[str], *, where: str) -> None:
    if config.get(key) not in known:
        raise CheckpointError(
            f"{where}: {key} is {shown(config.get(key))}; this release reads {', '.join(map(repr, known))} only, and never looks "
            "a format up by a name that a checkpoint brings along"
        )


def _check_field(config: Mapping[str, Any], key: str, expected: str, *, where: str) -> None:
    if config.get(key) != expected:
        raise CheckpointError(
            f"{where}: {key} is {shown(config.get(key))}; this release reads {expected!r} only, and never looks a "
            "format up by a name that a checkpoint brings along"
        )
