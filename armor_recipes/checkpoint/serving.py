"""What a server asks of packed layers that it runs fused and split over processes; one place for the plan and for the server.

A server runs some modules as one layer, and splits each layer over its processes (tensor parallelism): most by rows of the
weight, those that read what is split already by columns. A process then holds whole blocks of A, or of B, and whole bytes of the
bitmask, or the layer cannot be split. Splitting by columns is exact although A comes after the sum over processes: A is linear,
so each process applies it to its own part of the sum.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import lcm
from typing import Literal

from armor_recipes.checkpoint.config import LayerSpec
from armor_recipes.checkpoint.packing import KEPT_PER_VALUE

Side = Literal["rows", "columns"]

FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Layers of a server → last parts of the names of the modules that it runs as that one, of Llama and models named alike."""
SIDES: Mapping[str, Side] = {
    **{name: "rows" for members in FUSED.values() for name in members},
    "o_proj": "columns",
    "down_proj": "columns",
}
"""What is split of a module, by the last part of its name."""
KEY_VALUE = ("k_proj", "v_proj")
"""Modules that are split by key-value heads; where there are more processes than those, several hold the same head."""


def step_of(spec: LayerSpec, side: Side) -> int:
    """Rows or columns come in multiples of this: blocks, and along columns also numbers of the bitmask and groups of scales."""
    if side == "rows":
        return spec.block_size[0]
    return lcm(spec.block_size[1], 8, 2 * KEPT_PER_VALUE[spec.core], 2 * (spec.group_size or 1))


def split_problem(name: str, size: int, spec: LayerSpec, *, side: Side, ways: int) -> str | None:
    """Say why `size` rows or columns of the module `name` cannot be split over `ways` processes; None where they can."""
    step = step_of(spec, side)
    if size % (ways * step) == 0:
        return None
    return (
        f"{name}: {size} {side} over {ways} processes are not whole blocks for each: they would have to be a multiple of {ways} x "
        f"{step}, with {describe(spec)}"
    )


def group_problem(members: Mapping[str, LayerSpec | None]) -> str | None:
    """Say why these modules cannot run as one layer; None where they can. A module that is not packed has no spec."""
    (first, wanted), *others = (
        (name, None if spec is None else replace(spec, input_factor=None)) for name, spec in members.items()
    )
    for name, found in others:
        if found != wanted:
            return (
                f"{name} ({describe(found)}) runs as one layer with {first} ({describe(wanted)}), so they need one block size and "
                "one core, or must both be dense"
            )
    return None


def describe(spec: LayerSpec | None) -> str:
    """What the conditions depend on, in words."""
    if spec is None:
        return "dense"
    group = "" if spec.group_size is None else f" in groups of {spec.group_size}"
    activations = "" if spec.activations is None else f" and {spec.activations} activations"
    return f"block size {list(spec.block_size)}, {spec.core} core{group}{activations}"
