"""Linear layers that hold several projections in their rows, told by shapes: no list of architectures, no list of names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from armor_recipes.model.facts import ModelFacts
from armor_recipes.model.linears import Linears

#: Linear modules of an attention or an MLP with a fused one: that, and the one that reads what is made of its rows.
_PAIR = 2


class RowsOf(NamedTuple):
    """One projection of a fused layer, and how many of its rows it has."""

    name: str
    rows: int


def fused_layers(linears: Linears, facts: ModelFacts) -> dict[str, tuple[RowsOf, ...]]:
    """The parts of each fused layer, one after the other as they lie in its rows, by full name.

    A layer is fused where it has one linear module beside it, which reads as many columns as one part has rows: query, key and
    value by the config's heads or as three equal parts, gate and up as two. Layers that interleave their parts head by head are
    not told from these by shapes: `query_key_value` is such a name, and they are left out.
    """
    beside: dict[str, list[tuple[str, nn.Linear]]] = {}
    for name, module in linears.modules.items():
        beside.setdefault(name.rpartition(".")[0], []).append((name, module))
    pairs = [pair for pair in beside.values() if len(pair) == _PAIR]
    found = {}
    for (name, module), (_, reader) in (either for pair in pairs for either in (pair, pair[::-1])):
        parts = _parts(module.out_features, reader.in_features, facts)
        if parts and not name.endswith("query_key_value"):
            found[name] = tuple(RowsOf(part, rows) for part, rows in parts.items())
    return found


def _parts(rows: int, read: int, facts: ModelFacts) -> Mapping[str, int]:
    """Rows by part of a layer of so many rows, where the module after it reads `read` columns; empty where it has no parts."""
    key = (facts.key_value_heads or 0) * (facts.head_dim or 0)
    if key and read == (facts.heads or 0) * (facts.head_dim or 0) and rows == read + 2 * key:
        return {"query": read, "key": key, "value": key}
    if read and rows == 3 * read:
        return dict.fromkeys(("query", "key", "value"), read)
    return dict.fromkeys(("gate", "up"), read) if read and rows == 2 * read else {}
