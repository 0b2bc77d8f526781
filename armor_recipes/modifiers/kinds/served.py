"""What a recipe's `serve` asks of block sizes, module by module: for methods that choose them among many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

from armor_recipes.checkpoint.serving import FUSED, KEY_VALUE, SIDES
from armor_recipes.model.facts import ModelFacts
from armor_recipes.model.fused import RowsOf, fused_layers
from armor_recipes.model.linears import Linears
from armor_recipes.modifiers.base import ModuleShape, Served
from armor_recipes.recipe import Recipe


def served_shapes(
    shapes: Sequence[ModuleShape], linears: Linears, facts: ModelFacts, recipe: Recipe
) -> list[ModuleShape]:
    """The shapes with what the recipe's `serve` asks of each; as they are where nobody is to serve packed modules.

    What no block size makes right, such as heads that cannot be split, is left to the check of the plan.
    """
    if recipe.serve is None or recipe.output.format == "dense":
        return list(shapes)
    fused, ways = fused_layers(linears, facts), recipe.serve.tensor_parallel
    return [replace(shape, served=_served(shape, fused.get(shape.name, ()), facts, ways)) for shape in shapes]


def processes(part: str, facts: ModelFacts, ways: int) -> int:
    """Over how many of `ways` processes a module or a part so named is split: where there are more of them than key-value heads,
    several hold the same head.
    """
    return min(ways, facts.key_value_heads or 1) if part in (*KEY_VALUE, "key", "value") else ways


def _served(shape: ModuleShape, parts: Sequence[RowsOf], facts: ModelFacts, ways: Sequence[int]) -> Served:
    parent, _, last = shape.name.rpartition(".")
    layer = next((name for name, members in FUSED.items() if last in members), last)
    rows, columns = [(last, shape.d_out)], [(last, shape.d_in)]
    if last in FUSED and parts:
        rows = [(part.name, part.rows) for part in parts]
    one_way = (1,)
    by_rows = last in FUSED or SIDES.get(last) == "rows"
    return Served(
        f"{parent}.{layer}",
        _whole(rows, facts, ways if by_rows else one_way),
        _whole(columns, facts, ways if SIDES.get(last) == "columns" else one_way),
    )


def _whole(parts: Sequence[tuple[str, int]], facts: ModelFacts, ways: Sequence[int]) -> int:
    """What blocks must divide, to lie in one part and one process whichever of the numbers of processes there are."""
    return gcd(
        *(size // over for part, size in parts for way in ways if size % (over := processes(part, facts, way)) == 0)
    )
