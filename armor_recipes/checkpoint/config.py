"""`quantization_config`, in compressed-tensors' own schema.

One config group for every distinct block size, `format: sparse-24-bitmask`, with the full names of its modules as
targets. `weights` is what the schema asks for. What a loader has to know before it reads tensors is the block size,
and `weights.observer_kwargs` is the one free field that compressed-tensors keeps when it writes a config again: unknown
keys are dropped, and `block_structure` is accepted with one strategy only, which a quantised core could not use.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import CheckpointError

FORMAT = "sparse-24-bitmask"
QUANT_METHOD = "compressed-tensors"
FORMAT_VERSION = 1
"""Of the layout, written to `armor_manifest.json`; see docs/checkpoint.md for what later releases will read."""
SCHEMA_VERSION = "0.17.0"
"""The oldest compressed-tensors whose schema reads this: a constant, so that equal runs give equal bytes."""
BLOCK_SIZE_KEY = "armor_block_size"
VALUES, BITMASK, OUTPUT_FACTOR, INPUT_FACTOR = "weight", "bitmask", "armor_a", "armor_b"
TENSOR_NAMES = (VALUES, BITMASK, OUTPUT_FACTOR, INPUT_FACTOR)
"""Names of a layer's tensors after its module's name. The values are called `weight`, in their packed shape, on
purpose: a loader that does not know the format meets a size mismatch, where it would replace a missing `weight` by a
random one."""


@dataclass(frozen=True, slots=True)
class PackedShapes:
    """The shapes of a layer's tensors on disk, from its weight's shape `(O, I)` and block size `(b_o, b_i)`."""

    values: tuple[int, ...]
    bitmask: tuple[int, ...]
    a: tuple[int, ...]
    b: tuple[int, ...]

    @classmethod
    def of(cls, shape: tuple[int, int], block_size: tuple[int, int], *, name: str = "this layer") -> PackedShapes:
        """Compute them.

        Raises:
            CheckpointError: where the block size does not divide the weight, or 8 its columns.
        """
        (rows, columns), (b_o, b_i) = shape, block_size
        if rows % b_o or columns % b_i or columns % 8:
            raise CheckpointError(
                f"{name}: {block_size=} does not divide the weight's shape {shape}, or its {columns} columns are no "
                "multiple of 8: config.json does not belong to this model"
            )
        return cls((rows, columns // 2), (rows, columns // 8), (rows // b_o, b_o, b_o), (columns // b_i, b_i, b_i))


def quantization_config(layers: Mapping[str, PackedLinear], ignore: Sequence[str]) -> dict[str, Any]:
    """Describe these layers, with keys and an order that depend on nothing but the arguments.

    Args:
        layers: full module name → packed layer; not empty.
        ignore: full names of the linear modules left dense.
    """
    groups: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, layer in layers.items():
        _check_target(name)
        groups[layer.block_size].append(name)
    return {
        "config_groups": {
            f"group_{index}": _group(sorted(groups[block_size]), block_size)
            for index, block_size in enumerate(sorted(groups))
        },
        "format": FORMAT,
        "global_compression_ratio": None,
        "ignore": sorted(ignore),
        "kv_cache_scheme": None,
        "quant_method": QUANT_METHOD,
        "quantization_status": "compressed",
        "version": SCHEMA_VERSION,
    }


def block_size_of(weights: object, *, where: str) -> tuple[int, int]:
    """Read `(b_o, b_i)` from a group's `weights`. Raises `CheckpointError`, starting with `where`, if it has none."""
    kwargs = weights.get("observer_kwargs") if isinstance(weights, Mapping) else None
    value = kwargs.get(BLOCK_SIZE_KEY) if isinstance(kwargs, Mapping) else None
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(type(b) is int and b > 0 for b in value):
        raise CheckpointError(
            f"{where}: weights.observer_kwargs.{BLOCK_SIZE_KEY} is {value!r}; an ARMOR layer needs [out, in], two "
            "positive integers"
        )
    return value[0], value[1]


def layer_block_sizes(config: object, *, where: str) -> dict[str, tuple[int, int]]:
    """Map full module name → `(b_o, b_i)` for every ARMOR layer that a `quantization_config` names.

    Formats come from a fixed list (so far one): compressed-tensors looks formats up in a registry in which a name such
    as `path.py:name` executes that file, so nothing of a checkpoint reaches it unchecked.

    Raises:
        CheckpointError: if the config is not ours, starting with `where`, the file.
    """
    if not isinstance(config, Mapping) or config.get("quant_method") != QUANT_METHOD:
        raise CheckpointError(
            f"{where}: no quantization_config with quant_method {QUANT_METHOD!r}: not an ARMOR checkpoint"
        )
    _check_field(config, "format", FORMAT, where=where)
    _check_field(config, "quantization_status", "compressed", where=where)
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise CheckpointError(
            f"{where}: quantization_config.config_groups is {groups!r}; it must name at least one group"
        )
    sizes: dict[str, tuple[int, int]] = {}
    for key, group in groups.items():
        sizes.update(_group_block_sizes(group, where=f"{where}: quantization_config.config_groups.{key}"))
    return sizes


def _group(targets: list[str], block_size: tuple[int, int]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "input_activations": None,
        "output_activations": None,
        "targets": targets,
        "weights": {
            "dynamic": False,
            "group_size": None,
            # int with 16 bits stands for "not quantised": the schema has no 16-bit float. The stored dtype counts.
            "num_bits": 16,
            "observer_kwargs": {BLOCK_SIZE_KEY: list(block_size)},
            "strategy": "tensor",
            "symmetric": True,
            "type": "int",
        },
    }


def _group_block_sizes(group: object, *, where: str) -> dict[str, tuple[int, int]]:
    if not isinstance(group, Mapping):
        raise CheckpointError(f"{where} is {group!r}; it must be a mapping")
    _check_field(group, "format", FORMAT, where=where)
    targets = group.get("targets")
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise CheckpointError(f"{where}.targets is {targets!r}; it must be a list of full module names")
    size = block_size_of(group.get("weights"), where=where)
    return dict.fromkeys(_checked_targets(targets), size)


def _checked_targets(targets: Iterable[str]) -> Iterable[str]:
    for target in targets:
        _check_target(target)
        yield target


def _check_target(name: str) -> None:
    if not name or name.startswith("re:"):
        raise CheckpointError(f"target {name!r} is not a full module name; ARMOR groups name every module in full")


def _check_field(config: Mapping[str, Any], key: str, expected: str, *, where: str) -> None:
    if config.get(key) != expected:
        raise CheckpointError(
            f"{where}: {key} is {config.get(key)!r}; this release reads {expected!r} only, and never looks a "
            "format up by a name that a checkpoint brings along"
        )
