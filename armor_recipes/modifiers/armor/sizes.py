"""Block sizes that a budget buys: each module has a ladder of sizes, and the next step is taken where it is worth most.

The error that factors leave falls like exp(-r f), with f the share of a weight's values that A and B have (docs/solver.md). What it
costs the model is proportional to it, and was measured for each module at one rung.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

    def worth(self, place: int) -> float:
        """What of a cost of 1 at the measured rung the step up from a rung takes off, for each value; 0 from the last one."""
        if place + 1 >= len(self.rungs):
            return 0.0
        low, high, at = self.rungs[place], self.rungs[place + 1], self.measured.share
        gain = math.exp(-RATE * (low.share - at)) - math.exp(-RATE * (high.share - at))
        return gain / (high.values - low.values)


def factor_values(module: ModuleShape, block: Block) -> int:
    """How many values A and B have together."""
    return module.d_out * block[0] + module.d_in * block[1]


def core_bytes(module: ModuleShape) -> int:
    """Bytes of a packed 2:4 core: half the values, and a bit for each."""
    return module.dense_bytes // 2 + module.d_out * module.d_in // 8


def ladder(module: ModuleShape) -> Ladder | None:
    """Block sizes with rising f with which the module can be packed and is smaller than its dense weight.

    Of those with the same f the one with the most equal sides. None where there is no such size.
    """
    return _ladder(module.d_out, module.d_in, module.itemsize)


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

    Raises PlanError where the budget is below what the smallest sizes take, or above what the largest do.
    """
    ladders = {module.name: rungs for module in modules if (rungs := ladder(module)) is not None}
    if not ladders:
        return {}
    known = [module for module in modules if module.name in ladders]
    whole = sum(_price(budget, module, None) for module in known)
    fixed = sum(_price(budget, module, (0, 0)) for module in known)
    scale = known[0].itemsize if budget.word != "multiplications" else 1
    least, most = (
        (fixed + scale * sum(found.rungs[end].values for found in ladders.values())) / whole for end in (0, -1)
    )
    if not least <= budget.share <= most:
        raise PlanError(_out_of_range(budget, least, most))
    values = (budget.share * whole - fixed) / scale
    found = {name: rung.block for name, rung in spend(ladders, costs, values).items()}
    return {name: b_o if b_o == b_i else (b_o, b_i) for name, (b_o, b_i) in found.items()}


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
    end = "less than the smallest blocks take" if budget.share < least else "more than the largest blocks take"
    return f"block_size: {budget.word} {budget.share:g} is {end} in these modules: give {low:g} to {high:g}, or other `targets`"


@cache
def _ladder(d_out: int, d_in: int, itemsize: int) -> Ladder | None:
    module = ModuleShape("", d_out, d_in, itemsize)
    found: tuple[Rung, ...] = ()
    for step in _STEPS:
        found = _rungs(module, step)
        if len(found) >= _ENOUGH_RUNGS:
            break
    if not found:
        return None
    return Ladder(found, min(found, key=lambda rung: (abs(rung.share - _MEASURED_AT), rung.share)))


def _rungs(module: ModuleShape, step: int) -> tuple[Rung, ...]:
    """The rungs whose sides are multiples of `step`."""
    room = (module.dense_bytes - core_bytes(module)) // module.itemsize
    rows, columns = (
        [side for side in range(step, whole + 1, step) if whole % side == 0] for whole in (module.d_out, module.d_in)
    )
    pairs = [pair for pair in product(rows, columns) if pair[1] % 4 == 0 == module.d_in % 8]
    fitting = [pair for pair in pairs if factor_values(module, pair) < room]
    near = [pair for pair in fitting if max(pair) <= _WIDEST * min(pair)] or fitting
    found: list[Rung] = []
    for block in sorted(near, key=lambda pair: (factor_values(module, pair), max(pair) / min(pair), pair)):
        values = factor_values(module, block)
        if not found or values > found[-1].values:
            found.append(Rung(block, values / (module.d_out * module.d_in), values))
    return tuple(found)


def spend(ladders: Mapping[str, Ladder], costs: Mapping[str, float], limit: float) -> dict[str, Rung]:
    """A rung for each module, A and B of all together at most `limit` values, so that the sum of what errors cost is least.

    `costs` are at the measured rungs. From the lowest rungs on the step with the largest gain for each value comes first, ties by
    name; one that does not fit any more ends its module's climb. Gains shrink on each ladder, so at most the last step is missed.
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
