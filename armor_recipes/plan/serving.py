"""A recipe's `serve`: whether a server could run the packed modules fused and split, asked before anything is computed."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from math import gcd
from typing import NamedTuple

from armor_recipes.checkpoint.config import LayerSpec
from armor_recipes.checkpoint.serving import FUSED, SIDES, group_problem, split_problem
from armor_recipes.model.facts import ModelFacts
from armor_recipes.model.fused import RowsOf, fused_layers
from armor_recipes.model.linears import Linears
from armor_recipes.modifiers.kinds.served import processes
from armor_recipes.recipe import ModifierEntry

#: The largest block size that a message proposes.
_LARGEST = 512


class PackedModule(NamedTuple):
    """One module as it will be stored: its weight's shape `(O, I)`, and the entry that gave it its last form."""

    entry: ModifierEntry
    shape: tuple[int, int]
    spec: LayerSpec
    uses: tuple[str, ...] = ()


def serve_problems(
    linears: Linears, facts: ModelFacts, packed: Mapping[str, PackedModule], tensor_parallel: tuple[int, ...]
) -> Iterator[tuple[ModifierEntry, str, str]]:
    """Yield (entry, module, what is wrong) for all packed modules; the names of modules are those of `packed`."""
    fused = fused_layers(linears, facts)
    for name, module in packed.items():
        last = name.rpartition(".")[2]
        if module.uses:
            yield (
                module.entry,
                name,
                f"{name}: its weight is that of {', '.join(module.uses)}, too, and a server makes such layers once, under a name "
                "that no checkpoint has; leave out `serve` and serve a dense export, or add the module to `ignore`",
            )
            continue
        parts = fused.get(name) if last in FUSED else None
        if last not in SIDES and parts is None:
            known = ", ".join(SIDES)
            yield (
                module.entry,
                name,
                f"{name}: how a server fuses and splits a module of this name is not known, only of {known}; leave out `serve` and "
                "try the server, or add the module to `ignore`",
            )
            continue
        for ways in tensor_parallel:
            problem = _heads_problem(name, facts, ways)
            problem = problem or (
                _parts_split(name, module, parts, facts, ways) if parts else _split(name, module, facts, ways)
            )
            if problem is not None:
                yield module.entry, name, f"serve.tensor_parallel {ways}: {problem}"
    for name, members in _groups(packed, linears.modules):
        problem = group_problem({member: packed[member].spec if member in packed else None for member in members})
        if problem is not None:
            yield packed[name].entry, name, f"serve: {problem}; give them one modifier, or add all of them to `ignore`"


def _groups(packed: Mapping[str, PackedModule], linear: Container[str]) -> Iterator[tuple[str, list[str]]]:
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
    problem = split_problem(name, size, module.spec, side=side, ways=processes(last, facts, ways))
    return problem and f"{problem}; choose a block size (and group size) that fits, or add {name!r} to `ignore`"


def _parts_split(name: str, module: PackedModule, parts: Sequence[RowsOf], facts: ModelFacts, ways: int) -> str | None:
    """A fused layer is split part by part, so each part is whole blocks for each process, one process or several."""
    for part, rows in parts:
        over = processes(part, facts, ways)
        problem = split_problem(f"{name} ({part})", rows, module.spec, side="rows", ways=over)
        if problem is not None:
            sizes = sizes_that_fit(parts, over)
            advice = f"choose an output block size of {sizes}, or add {name!r} to `ignore`"
            return f"{problem}; its parts are {described(parts)}: {advice}"
    return None


def straddling(linears: Linears, facts: ModelFacts, blocks: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, str]]:
    """Yield (module, sentence) for each fused layer with blocks of A that lie in two of its parts; `blocks` are sizes by module.

    That is right as long as the layer runs as it is, and no server can split it.
    """
    for name, parts in fused_layers(linears, facts).items():
        if name in blocks and any(rows % blocks[name][0] for _, rows in parts):
            yield (
                name,
                f"{name}: blocks of {blocks[name][0]} rows lie in two of its parts ({described(parts)}); it runs as it is, but no "
                f"server can run its parts apart: output block sizes that fit are {sizes_that_fit(parts, 1)}",
            )


def described(parts: Sequence[RowsOf]) -> str:
    """The parts of a fused layer in words."""
    return ", ".join(f"{part} {rows} rows" for part, rows in parts)


def sizes_that_fit(parts: Sequence[RowsOf], ways: int) -> list[int]:
    """Output block sizes that divide each part over so many processes."""
    common = gcd(*(rows for _, rows in parts)) // ways
    return [size for size in range(1, min(common, _LARGEST) + 1) if common % size == 0]


def _heads_problem(name: str, facts: ModelFacts, ways: int) -> str | None:
    """Attention is split by heads."""
    if name.rpartition(".")[2] not in ("qkv_proj", *FUSED["qkv_proj"]):
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
