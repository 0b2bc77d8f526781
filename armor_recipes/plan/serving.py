"""A recipe's `serve`: whether a server could run the packed modules fused and split, asked before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from torch import nn

from armor_recipes.checkpoint.config import LayerSpec
from armor_recipes.checkpoint.serving import FUSED, KEY_VALUE, SIDES, group_problem, split_problem
from armor_recipes.model.facts import ModelFacts
from armor_recipes.recipe import ModifierEntry


class PackedModule(NamedTuple):
    """One module as it will be stored: its weight's shape `(O, I)`, and the entry that gave it its last form."""

    entry: ModifierEntry
    shape: tuple[int, int]
    spec: LayerSpec


def serve_problems(
    model: nn.Module, facts: ModelFacts, packed: Mapping[str, PackedModule], tensor_parallel: tuple[int, ...]
) -> Iterator[tuple[ModifierEntry, str, str]]:
    """Yield (entry, module, what is wrong) for all packed modules; the names of modules are those of `packed`."""
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for name, module in packed.items():
        if name.rpartition(".")[2] not in SIDES:
            known = ", ".join(SIDES)
            yield (
                module.entry,
                name,
                f"{name}: how a server fuses and splits a module of this name is not known, only of {known}; leave out `serve` and "
                "try the server, or add the module to `ignore`",
            )
            continue
        for ways in tensor_parallel:
            problem = _heads_problem(name, facts, ways) or _split(name, module, facts, ways)
            if problem is not None:
                yield module.entry, name, f"serve.tensor_parallel {ways}: {problem}"
    for name, members in _groups(packed, linear):
        problem = group_problem({member: packed[member].spec if member in packed else None for member in members})
        if problem is not None:
            yield packed[name].entry, name, f"serve: {problem}; give them one modifier, or add all of them to `ignore`"


def _groups(packed: Mapping[str, PackedModule], linear: set[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield a packed module of each group that a server runs as one layer, and the linear modules of the group."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in packed)
    for parent in parents:
        for group in FUSED.values():
            members = [f"{parent}.{member}" for member in group if f"{parent}.{member}" in linear]
            first = next((member for member in members if member in packed), None)
            if first is not None:
                yield first, members


def _split(name: str, module: PackedModule, facts: ModelFacts, ways: int) -> str | None:
    last = name.rpartition(".")[2]
    side = SIDES[last]
    size = module.shape[0 if side == "rows" else 1]
    if last in KEY_VALUE:
        ways = min(ways, _heads(facts)[1])
    problem = split_problem(name, size, module.spec, side=side, ways=ways)
    return problem and f"{problem}; choose a block size (and group size) that fits, or add {name!r} to `ignore`"


def _heads_problem(name: str, facts: ModelFacts, ways: int) -> str | None:
    """Attention is split by heads."""
    if name.rpartition(".")[2] not in FUSED["qkv_proj"]:
        return None
    heads, key_value = _heads(facts)
    if heads % ways == 0 and (key_value % ways == 0 or ways % key_value == 0):
        return None
    return (
        f"{name}: {heads} heads and {key_value} key-value heads cannot be split over {ways} processes; leave {ways} out"
    )


def _heads(facts: ModelFacts) -> tuple[int, int]:
    """Attention heads and key-value heads; (1, 1) where the config names none."""
    return facts.heads or 1, facts.key_value_heads or 1
