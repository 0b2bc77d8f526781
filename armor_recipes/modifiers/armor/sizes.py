"""Block sizes that a budget buys: each module has a ladder of sizes, and the next step is taken where it is worth most.

The error that factors leave falls like exp(-r f), with f the share of a weight's values that A and B have (docs/solver.md). What it
costs the model is proportional to it, and was measured for each module at one rung.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from typing import NamedTuple

from armor_recipes.errors import PlanError
from armor_recipes.modifiers.armor.config import Budget
from armor_recipes.modifiers.base import ModuleShape

Block = tuple[int, int]
#: r: how fast the error falls. Medians on SmolLM2-135M are 5.0 to 7.0; the same for all, only its size relative to f matters.
RATE = 6.0
#: f of the rung at which costs are measured.
_MEASURED_AT = 0.1
#: Sides are multiples of the first of these with which there are enough rungs: whole vectors of a kernel, whole groups, any.
_STEPS, _ENOUGH_RUNGS = (8, 4, 1), 6
#: Largest ratio of the two sides of a rung: how f is split between them hardly matters, extremes were not tried.
_WIDEST = 2


class Rung(NamedTuple):
    """A block size with how many values A and B have then, and f, their share of the weight's."""

    block: Block
    share: float
    values: int


@dataclass(frozen=True, slots=True)
class Ladder:
    """Rungs with rising f, and the one at which the module's cost is measured."""

    rungs: tuple[Rung, ...]
    measured: Rung

    def felt(self, share: float) -> float:
        """What is left at such an f of a cost of 1 at the measured rung."""
        return math.exp(-RATE * (share - self.measured.share))

    def worth(self, place: int) -> float:
        """What of a cost of 1 at the measured rung the step up from a rung takes off, for each value; 0 from the last one."""
        if place + 1 >= len(self.rungs):
            return 0.0
        low, high = self.rungs[place], self.rungs[place + 1]
        return (self.felt(low.share) - self.felt(high.share)) / (high.values - low.values)


@dataclass(frozen=True, slots=True)
class SharedLadder:
    """Rungs of modules that have one size, with what errors of all of them cost at each; steps up are worth less and less."""

    rungs: tuple[Rung, ...]
    costs: tuple[float, ...]

    def worth(self, place: int) -> float:
        """What the step up from a rung takes off, for each value; 0 from the last one."""
        if place + 1 >= len(self.rungs):
            return 0.0
        return _slope(*((self.rungs[end].values, self.costs[end]) for end in (place, place + 1)))


def factor_values(module: ModuleShape, block: Block) -> int:
    """How many values A and B have together."""
    return module.d_out * block[0] + module.d_in * block[1]


def core_bytes(module: ModuleShape) -> int:
    """Bytes of a packed 2:4 core: half the values, and a bit for each."""
    return module.dense_bytes // 2 + module.d_out * module.d_in // 8


def ladder(module: ModuleShape) -> Ladder | None:
    """Block sizes with rising f with which the module can be packed and is smaller than its dense weight, and served.

    Of those with the same f the one with the most equal sides. None where there is no such size.
    """
    rungs, free = _rungs_of((_nameless(module),)), _rungs_of((_nameless(replace(module, served=None)),))
    if not rungs:
        return None
    return Ladder(rungs, min(free, key=lambda rung: (abs(rung.share - _MEASURED_AT), rung.share)))


def has_sizes(module: ModuleShape) -> bool:
    """Whether there is anything to choose from."""
    return ladder(module) is not None


def measured_block(module: ModuleShape) -> Block:
    """The size at which the module's cost is measured, where there is one."""
    found = ladder(module)
    assert found is not None, "a module without sizes is not planned"
    return found.measured.block


def choose(budget: Budget, modules: Sequence[ModuleShape], costs: Mapping[str, float]) -> dict[str, int | Block]:
    """A size for each module that can be packed, by what its errors cost.

    Modules that a server runs as one layer have one size. Raises PlanError where the budget is below what the smallest sizes take,
    or above what the largest do.
    """
    ladders = {module.name: found for module in modules if (found := ladder(module)) is not None}
    if not ladders:
        return {}
    known = [module for module in modules if module.name in ladders]
    layers = _layers(known)
    whole = sum(_price(budget, module, None) for module in known)
    fixed = sum(_price(budget, module, (0, 0)) for module in known)
    scale = known[0].itemsize if budget.word != "multiplications" else 1
    rungs = [_common_rungs(members) for members in layers.values()]
    least, most = ((fixed + scale * sum(found[end].values for found in rungs)) / whole for end in (0, -1))
    if not least <= budget.share <= most:
        raise PlanError(_out_of_range(budget, least, most))
    climbs = {layer: _climb(members, ladders, costs) for layer, members in layers.items()}
    felt = {layer: costs[members[0].name] if len(members) == 1 else 1.0 for layer, members in layers.items()}
    bought = spend(climbs, felt, (budget.share * whole - fixed) / scale)
    blocks = {module.name: bought[layer].block for layer, members in layers.items() for module in members}
    sizes = ((module.name, blocks[module.name]) for module in known)
    return {name: b_o if b_o == b_i else (b_o, b_i) for name, (b_o, b_i) in sizes}


def _layers(modules: Sequence[ModuleShape]) -> dict[str, list[ModuleShape]]:
    """Modules that have one size, by the layer that a server runs them as; others each by itself."""
    found: dict[str, list[ModuleShape]] = {}
    for module in modules:
        found.setdefault(module.name if module.served is None else module.served.layer, []).append(module)
    return {members[0].name if len(members) == 1 else layer: members for layer, members in found.items()}


def _common_rungs(members: Sequence[ModuleShape]) -> tuple[Rung, ...]:
    """Sizes that all of these can have, with rising numbers of values: where each has one, 1 x 4 fits all."""
    return _rungs_of(tuple(sorted(_nameless(module) for module in members)))


def _climb(
    members: Sequence[ModuleShape], ladders: Mapping[str, Ladder], costs: Mapping[str, float]
) -> Ladder | SharedLadder:
    """The ladder of a module, or that of several with one size: of their rungs those on the lower hull of cost over values."""
    if len(members) == 1:
        return ladders[members[0].name]

    def cost(rung: Rung) -> float:
        shares = {module.name: factor_values(module, rung.block) / (module.d_out * module.d_in) for module in members}
        return sum(costs[name] * ladders[name].felt(share) for name, share in shares.items())

    hull: list[tuple[Rung, float]] = []
    for rung in _common_rungs(members):
        point = rung, cost(rung)
        while len(hull) > 1 and _step(hull[-2], hull[-1]) < _step(hull[-1], point):
            hull.pop()
        hull.append(point)
    while len(hull) > 1 and _step(hull[-2], hull[-1]) < 0:
        hull.pop()  # wider for one of them is narrower for none, but f is not: it may cost more
    return SharedLadder(tuple(rung for rung, _ in hull), tuple(felt for _, felt in hull))


def _step(low: tuple[Rung, float], high: tuple[Rung, float]) -> float:
    return _slope((low[0].values, low[1]), (high[0].values, high[1]))


def _slope(low: tuple[int, float], high: tuple[int, float]) -> float:
    """What of the cost each value between two points takes off."""
    return (low[1] - high[1]) / (high[0] - low[0])


def check_sizes(budget: Budget, modules: Sequence[ModuleShape]) -> None:
    """Raise PlanError where a budget's sizes are of modules that are not taken, or take more than it."""
    sizes, by_name = budget.sizes or {}, {module.name: module for module in modules}
    vain = [name for name in sizes if name not in by_name]
    if vain:
        raise PlanError(f"block_size.sizes names {vain[0]}, which is none of the modules: remove it, or remove `sizes`")
    pairs = {name: (size, size) if isinstance(size, int) else size for name, size in sizes.items()}
    taken = sum(_price(budget, by_name[name], block) for name, block in pairs.items())
    whole = sum(_price(budget, by_name[name], None) for name in pairs)
    if taken > budget.share * whole:
        raise PlanError(
            f"block_size.sizes take {taken / whole:.4f} of the dense weights', more than {budget.word} {budget.share:g}: remove "
            "`sizes`, which chooses all anew"
        )


def _price(budget: Budget, module: ModuleShape, block: Block | None) -> int:
    """What the budget counts for a module: with factors of that size, or dense."""
    weights = module.d_out * module.d_in
    if budget.word == "multiplications":
        return weights if block is None else weights // 2 + factor_values(module, block)
    if block is None:
        return module.dense_bytes
    core = core_bytes(module) if budget.word == "budget" else 0
    return core + factor_values(module, block) * module.itemsize


def _out_of_range(budget: Budget, least: float, most: float) -> str:
    low, high = math.ceil(least * 1e4) / 1e4, math.floor(most * 1e4) / 1e4
    if low > high:
        return (
            f"block_size: there is nothing for {budget.word} {budget.share:g} to choose from, these modules have one size each, "
            f"which takes {least:.4f}: give sizes, or other `targets`"
        )
    end = "less than the smallest blocks take" if budget.share < least else "more than the largest blocks take"
    return f"block_size: {budget.word} {budget.share:g} is {end} in these modules: give {low:g} to {high:g}, or other `targets`"


class _Sides(NamedTuple):
    """A module without its name, and what its blocks must divide."""

    d_out: int
    d_in: int
    itemsize: int
    rows: int
    columns: int

    @property
    def shape(self) -> ModuleShape:
        return ModuleShape("", self.d_out, self.d_in, self.itemsize)

    def takes(self, block: Block) -> bool:
        """Whether it is packed with blocks of that size, in less than its dense bytes."""
        room = (self.shape.dense_bytes - core_bytes(self.shape)) // self.itemsize
        return block[1] % 4 == 0 == self.d_in % 8 and factor_values(self.shape, block) < room


def _nameless(module: ModuleShape) -> _Sides:
    served = module.served
    sides = (module.d_out, module.d_in) if served is None else (served.rows, served.columns)
    return _Sides(module.d_out, module.d_in, module.itemsize, *sides)


@cache
def _rungs_of(members: tuple[_Sides, ...]) -> tuple[Rung, ...]:
    """The rungs that all of these modules can have."""
    found: tuple[Rung, ...] = ()
    for step in _STEPS:
        found = _rungs(members, step)
        if len(found) >= _ENOUGH_RUNGS:
            break
    return found


def _rungs(members: Sequence[_Sides], step: int) -> tuple[Rung, ...]:
    """The rungs whose sides are multiples of `step`; f and values are those of all together."""
    whole = math.gcd(*(one.rows for one in members)), math.gcd(*(one.columns for one in members))
    rows, columns = ([side for side in range(step, length + 1, step) if length % side == 0] for length in whole)
    weights = sum(one.d_out * one.d_in for one in members)

    def values_of(block: Block) -> int:
        return sum(factor_values(one.shape, block) for one in members)

    fitting = [pair for pair in product(rows, columns) if all(one.takes(pair) for one in members)]
    near = [pair for pair in fitting if max(pair) <= _WIDEST * min(pair)] or fitting
    found: list[Rung] = []
    for block in sorted(near, key=lambda pair: (values_of(pair), max(pair) / min(pair), pair)):
        values = values_of(block)
        if not found or values > found[-1].values:
            found.append(Rung(block, values / weights, values))
    return tuple(found)


def spend(ladders: Mapping[str, Ladder | SharedLadder], costs: Mapping[str, float], limit: float) -> dict[str, Rung]:
    """A rung for each module, A and B of all together at most `limit` values, so that the sum of what errors cost is least.

    `costs` are at the measured rungs, and 1 for a `SharedLadder`, which has them. From the lowest rungs on the step with the
    largest gain for each value comes first, ties by name; one that does not fit any more ends its module's climb. Gains shrink on
    each ladder, so at most the last step is missed.
    """
    places = dict.fromkeys(sorted(ladders), 0)
    left = limit - sum(ladders[name].rungs[0].values for name in places)
    steps = [(-costs[name] * ladders[name].worth(0), name) for name in places]
    heapq.heapify(steps)
    while steps:
        _, name = heapq.heappop(steps)
        found, place = ladders[name], places[name]
        if place + 1 == len(found.rungs):
            continue
        values = found.rungs[place + 1].values - found.rungs[place].values
        if values > left:
            continue
        left -= values
        places[name] = place + 1
        heapq.heappush(steps, (-costs[name] * found.worth(place + 1), name))
    return {name: ladders[name].rungs[places[name]] for name in ladders}
