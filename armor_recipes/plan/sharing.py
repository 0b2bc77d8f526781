"""Weights that several modules share: taken once, on all of them, or not at all."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from armor_recipes.errors import UnfitError
from armor_recipes.model.blocks import Stacks
from armor_recipes.model.linears import Linears, Place


@dataclass(frozen=True, slots=True)
class Shared:
    """Targeted linear modules with each weight once.

    Attributes:
        names: in the model's order; of modules that share a weight the one in the first block.
        uses: for each such module the others, in the model's order.
        unfit: those whose weight would be changed for others that are not to change, or cannot.
    """

    names: tuple[str, ...]
    uses: Mapping[str, tuple[str, ...]]
    unfit: Mapping[str, UnfitError]


def resolve_shared(names: Sequence[str], ignored: Collection[str], linears: Linears, stacks: Stacks) -> Shared:
    """Sort out which of the targeted modules stand for others, `ignored` being those that the entry holds back."""
    taken = set(names)
    fit: list[str] = []
    uses: dict[str, tuple[str, ...]] = {}
    unfit: dict[str, UnfitError] = {}
    for name in names:
        places = linears.places(name)
        error = _refusal(name, linears.others(name), taken, ignored, stacks)
        if error is not None:
            unfit[name] = error
        elif not places or name == _first(places, stacks):
            fit.append(name)
            uses |= {name: tuple(place.module for place in linears.others(name))} if places else {}
    return Shared(tuple(fit), uses, unfit)


def stacks_with_shared_weights(names: Iterable[str], linears: Linears, stacks: Stacks) -> tuple[str, ...]:
    """The stacks of those linear modules whose weights other blocks use, too: such blocks are not run one by one."""
    found: dict[str, None] = {}
    for name in names:
        own = stacks.block_of(name)
        others = {stacks.block_of(place.module) for place in linears.others(name) if place.linear} - {own, None}
        if own is not None and others:
            found[stacks.of_block(own).name] = None
    return tuple(found)


def _refusal(
    name: str, others: Sequence[Place], taken: Collection[str], ignored: Collection[str], stacks: Stacks
) -> UnfitError | None:
    """Why a weight cannot be changed for all of its places, or None where it can."""
    for place in others:
        if not place.linear:
            why = ""
        elif stacks.block_of(place.module) is None:
            why = ", which is not inside a decoder layer"
        elif place.module not in taken:
            why = f", which {'`ignore` holds back' if place.module in ignored else '`targets` does not match'}"
        else:
            continue
        return UnfitError(
            f"the weight of {name} is tied to {place.described}{why}",
            f"add {name!r} to `ignore`" + (", or target both" if place.linear else ""),
        )
    return None


def _first(places: Sequence[Place], stacks: Stacks) -> str:
    return min(places, key=lambda place: stacks.block_of(place.module) or 0).module
