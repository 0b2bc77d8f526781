"""Block sizes that a budget buys: never more than it, where errors cost most, and what cannot be had is refused."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armor_recipes.errors import PlanError, RecipeError, UnfitError
from armor_recipes.modifiers import ModuleShape
from armor_recipes.modifiers.armor import ARMORConfig, ARMORModifier
from armor_recipes.modifiers.armor.config import Budget
from armor_recipes.modifiers.armor.sizes import RATE, choose, factor_values, ladder, spend
from armor_recipes.modifiers.base import Served
from armor_recipes.run.job import read_recipe
from tests.support.engine import recipe

SHAPES = [
    ModuleShape("a.q_proj", 64, 64, 2),
    ModuleShape("a.k_proj", 32, 64, 2),
    ModuleShape("a.up_proj", 192, 64, 2),
    ModuleShape("a.down_proj", 64, 192, 2),
]
costs_of_four = st.lists(st.floats(0, 1e3), min_size=4, max_size=4)


def made(budget: dict[str, Any], **fields: Any) -> ARMORModifier:
    return ARMORModifier(ARMORConfig(targets=("Linear",), block_size=Budget(**budget), **fields))


def taken(word: str, sizes: dict[str, Any]) -> float:
    """What these sizes take of all, by the plan's own numbers."""
    total = whole = 0
    for shape in SHAPES:
        planned = made({word: 1.0, "sizes": sizes}).plan(shape)
        weights = shape.d_out * shape.d_in
        assert planned.block_size is not None
        counted = {
            "budget": (planned.stored_bytes, shape.dense_bytes),
            "overhead": (planned.factor_bytes, shape.dense_bytes),
            "multiplications": (weights // 2 + factor_values(shape, planned.block_size), weights),
        }
        total, whole = total + counted[word][0], whole + counted[word][1]
    return total / whole


@given(costs_of_four, st.sampled_from([("budget", 0.85), ("overhead", 0.25), ("multiplications", 0.8)]))
def test_no_budget_is_exceeded_and_little_of_it_is_left(costs: list[float], asked: tuple[str, float]) -> None:
    word, share = asked
    named = {shape.name: cost for shape, cost in zip(SHAPES, costs, strict=True)}
    sizes = choose(Budget(**{word: share}), SHAPES, named)
    assert list(sizes) == [shape.name for shape in SHAPES]
    assert share - 0.1 < taken(word, sizes) <= share
    assert sizes == choose(Budget(**{word: share}), SHAPES[::-1], named)  # in another order


@given(costs_of_four, st.floats(0.1, 0.9))
def test_no_other_sizes_of_no_more_values_cost_much_less(costs: list[float], part: float) -> None:
    """Against all combinations: what the steps miss is less than the best step that would not fit any more."""
    ladders = {shape.name: found for shape in SHAPES[:3] if (found := ladder(shape)) is not None}
    named = dict(zip(ladders, costs, strict=False))
    low, high = (sum(one.rungs[end].values for one in ladders.values()) for end in (0, -1))
    limit = low + part * (high - low)

    def total(rungs: Any) -> float:
        pairs = zip(ladders, rungs, strict=True)
        return sum(named[n] * math.exp(-RATE * (rung.share - ladders[n].measured.share)) for n, rung in pairs)

    every = itertools.product(*(one.rungs for one in ladders.values()))
    best = min(total(rungs) for rungs in every if sum(rung.values for rung in rungs) <= limit)
    found = spend(ladders, named, limit)
    assert sum(rung.values for rung in found.values()) <= limit
    largest = max(
        named[name] * one.worth(place) * (one.rungs[place + 1].values - one.rungs[place].values)
        for name, one in ladders.items()
        for place in range(len(one.rungs) - 1)
    )
    assert total(found.values()) <= best + largest + 1e-9


@given(costs_of_four, st.floats(0.05, 0.95))
def test_what_is_served_as_one_layer_has_one_size_and_no_others_cost_much_less(costs: list[float], part: float) -> None:
    """Against all sizes of the layer and of the other two modules: what is missed is less than one step of those worth taking."""
    layer = Served("a.qk", 16, 64)  # two processes: 16 rows of the narrower one
    shapes = [replace(shape, served=layer) for shape in SHAPES[:2]] + SHAPES[2:]
    named = {shape.name: cost for shape, cost in zip(shapes, costs, strict=True)}
    units = [shapes[:2], shapes[2:3], shapes[3:]]
    whole = sum(shape.d_out * shape.d_in for shape in shapes)

    def values(unit: list[ModuleShape], size: Any) -> int:
        return sum(factor_values(shape, both(size)) for shape in unit)

    def felt(unit: list[ModuleShape], size: Any) -> float:
        found = 0.0
        for shape in unit:
            rungs = ladder(shape)
            assert rungs is not None
            f = values([shape], size) / (shape.d_out * shape.d_in)
            found += named[shape.name] * math.exp(-RATE * (f - rungs.measured.share))
        return found

    blocks = [
        [rung.block for rung in found.rungs if all(values([s], rung.block) < 0.4375 * s.d_out * s.d_in for s in unit)]
        for unit in units
        if (found := ladder(unit[0])) is not None
    ]
    points = [[(values(u, b), felt(u, b)) for b in found] for u, found in zip(units, blocks, strict=True)]
    every = list(itertools.product(*points))
    low, high = (end(sum(v for v, _ in combined) for combined in every) for end in (min, max))
    limit = int(low + part * (high - low))
    sizes = choose(Budget(overhead=(limit + 0.5) / whole), shapes, named)
    assert sizes["a.q_proj"] == sizes["a.k_proj"]
    assert all(16 % side == 0 for side in both(sizes["a.q_proj"]))
    assert sum(values([shape], sizes[shape.name]) for shape in shapes) <= limit
    best = min(sum(cost for _, cost in combined) for combined in every if sum(v for v, _ in combined) <= limit)
    step = max(a[1] - b[1] for found in points for a, b in itertools.pairwise(hull_of(found)))
    assert sum(felt([shape], sizes[shape.name]) for shape in shapes) <= best + step + 1e-9


def hull_of(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Those that no line between two others passes below."""
    ordered = sorted(set(points))
    return [
        point
        for place, point in enumerate(ordered)
        if all(
            point[1] * (b[0] - a[0]) <= a[1] * (b[0] - point[0]) + b[1] * (point[0] - a[0]) + 1e-12
            for a, b in itertools.product(ordered[:place], ordered[place + 1 :])
            if a[0] < point[0] < b[0]
        )
    ]


def both(size: Any) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else size


def test_where_a_weight_costs_more_blocks_are_larger_and_of_equal_modules_the_first_are_no_smaller() -> None:
    shapes = [ModuleShape(f"layers.{i}.up_proj", 192, 64, 2) for i in range(6)]
    costs = dict.fromkeys((shape.name for shape in shapes), 1.0) | {"layers.3.up_proj": 4.0}
    ladders = {shape.name: found for shape in shapes if (found := ladder(shape)) is not None}
    limit = 6 * ladders[shapes[0].name].rungs[2].values
    found = {name: rung.values for name, rung in spend(ladders, costs, limit).items()}
    others = [found[name] for name in found if name != "layers.3.up_proj"]
    assert found["layers.3.up_proj"] > max(others)
    assert others == sorted(others, reverse=True)  # ties by name


def test_sizes_divide_their_sides_are_packed_and_smaller_than_dense() -> None:
    for shape in [
        *SHAPES,
        ModuleShape("odd", 99, 200, 2),
        ModuleShape("small", 32, 32, 2),
        ModuleShape("wide", 24, 4096, 4),
    ]:
        found = ladder(shape)
        assert found is not None
        values = [rung.values for rung in found.rungs]
        assert values == sorted(set(values))
        for rung in found.rungs:
            cost = made({"budget": 1.0, "sizes": {shape.name: rung.block}}).plan(shape)
            assert cost.stored_as == "packed"
            assert cost.block_size == rung.block
            assert cost.stored_bytes < shape.dense_bytes


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"budget": 0.5}, "budget 0.5 is less than the smallest blocks take in these modules: give 0[.]"),
        ({"budget": 1.0}, "budget 1 is more than the largest blocks take in these modules: give 0[.]"),
        ({"overhead": 0.01}, "overhead 0.01 is less than the smallest"),
        ({"multiplications": 0.5}, "multiplications 0.5 is less than the smallest"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_can(asked: dict[str, Any], text: str) -> None:
    with pytest.raises(PlanError, match=text) as caught:
        made(asked).among(SHAPES)
    low, high = (float(word.rstrip(",")) for word in str(caught.value).split("give ")[1].split(" ")[:3:2])
    for share in (low, high):
        made({next(iter(asked)): share}).among(SHAPES)


def test_one_size_each_is_no_choice() -> None:
    with pytest.raises(PlanError, match=r"nothing for budget 0.8 to choose from, .* which takes 0.9852: give sizes"):
        made({"budget": 0.8}).among([ModuleShape("narrow", 10, 40, 2), ModuleShape("too", 10, 48, 2)])


def test_a_module_that_cannot_be_packed_is_unfit() -> None:
    narrow = ModuleShape("narrow", 64, 36, 2)
    together = made({"budget": 0.85}).among([*SHAPES, narrow])
    with pytest.raises(UnfitError, match="no block size packs narrow"):
        together.plan(narrow)
    assert together.plan(SHAPES[0]).block_size


def test_sizes_of_a_budget_are_taken_as_they_are_or_refused() -> None:
    sizes = choose(Budget(budget=0.85), SHAPES, {shape.name: 1.0 for shape in SHAPES})
    modifier = made({"budget": 0.85, "sizes": sizes})
    assert modifier.unsettled is None
    assert modifier.among(SHAPES) is modifier
    with pytest.raises(PlanError, match=r"none for a\.down_proj"):
        made({"budget": 0.85, "sizes": {"a.q_proj": 8}}).plan(SHAPES[3])
    with pytest.raises(PlanError, match=r"names a\.down_proj, which is none of the modules"):
        modifier.among(SHAPES[:3])
    with pytest.raises(PlanError, match=r"take 0.8\d+ of the dense weights', more than budget 0.8"):
        made({"budget": 0.8, "sizes": sizes}).among(SHAPES)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"block_size": {"budget": "lots"}}, r"block_size.budget: is no share: give a number .* \(value 'lots'\)"),
        ({"block_size": {"budget": 75}}, r"block_size.budget: is no share"),
        ({"block_size": {"overhead": "5 MB"}}, r"block_size.overhead: is no share"),
        ({"block_size": {"budgte": 0.75}}, r"block_size.budgte: unknown key; nearest valid key: budget"),
        ({"block_size": {"budget": 0.75, "overhead": "5%"}}, r"must have one of budget, overhead and multiplications"),
        ({"block_size": {}}, r"must have one of budget, overhead and multiplications"),
        ({"block_size": {"budget": 0.75}, "pattern": "4:8"}, r"4:8 is stored dense"),
        ({"block_size": {"budget": 0.75}, "share_input_factor": True}, r"share_input_factor needs one block_size"),
    ],
)
def test_what_is_no_budget_is_refused_in_its_place(fields: dict[str, Any], text: str) -> None:
    with pytest.raises(RecipeError, match=text):
        read_recipe(recipe("m", ARMORModifier={"targets": ["Linear"], **fields}))


def test_a_percentage_is_a_share() -> None:
    read = read_recipe(recipe("m", ARMORModifier={"targets": ["Linear"], "block_size": {"overhead": "12.5%"}}))
    found: Any = read.modifiers[0].config
    assert (found.block_size.word, found.block_size.share) == ("overhead", 0.125)
