"""One list of checks that every registered modifier goes through; a new modifier needs no line here but an example."""

from __future__ import annotations

import copy
import math
from typing import Any

import pydantic
import pytest
import torch
from torch import Tensor

from armor_recipes.errors import NumericalError, PlanError
from armor_recipes.modifiers import (
    Estimate,
    FactorModifier,
    Modifier,
    ModuleShape,
    Outcome,
    Quantizer,
    Rearranger,
    Refiner,
    Smoother,
    config_types,
    modifiers,
)
from armor_recipes.recipe.schema import CalibrationSpec, ModifierConfig
from armor_recipes.solver.blockdiag import fold
from tests.support.engine import rng_states

#: Fields of each modifier beside `targets`, small enough for a test. A modifier that is not named here fails below.
EXAMPLES: dict[str, list[dict[str, Any]]] = {
    "ARMORModifier": [
        {"block_size": 8, "iterations": 3},
        {"block_size": (4, 8), "iterations": 0},
        {"block_size": "auto", "iterations": 4, "solver": "adam"},
        {"block_size": 8, "iterations": 3, "objective": "hessian"},
        {"block_size": 8, "iterations": 3, "objective": "hessian", "shrinkage": 0.5, "normalize": False},
        {"block_size": 8, "iterations": 3, "normalize": False},
    ],
    "MagnitudeModifier": [{}],
    "NoWagModifier": [{}],
    "SparseGPTModifier": [{"pattern": "2:4"}, {"mask_structure": "2:4", "dampening_frac": 0.1}],
    "WandaPruningModifier": [{"pattern": "2:4"}],
}
#: What the configs of other kinds cannot do without.
REQUIRED: dict[str, dict[str, Any]] = {key: {"scheme": "W8A16"} for key in ("GPTQModifier", "QuantizationModifier")}
#: Refiners go through tests/modifiers/test_refiners.py, rearrangers and smoothers through a file of their own, and modifiers of
#: factors through test_quantization.py beside it.
OTHER_KINDS = {
    name
    for name, kind in modifiers().items()
    if issubclass(kind, (FactorModifier, Quantizer, Rearranger, Refiner, Smoother))
}
CASES = [
    (name, index) for name in modifiers() if name not in OTHER_KINDS for index in range(len(EXAMPLES.get(name, [{}])))
]
SHAPE = ModuleShape("model.layers.0.mlp.up_proj", 32, 16, 2)


@pytest.fixture(params=CASES, ids=lambda case: f"{case[0]}-{case[1]}")
def modifier(request: pytest.FixtureRequest) -> Modifier[Any]:
    name, index = request.param
    kind = modifiers()[name]
    return kind(kind.config_type(targets=("Linear",), **EXAMPLES[name][index]))


def weight() -> Tensor:
    return torch.randn(SHAPE.d_out, SHAPE.d_in, generator=torch.Generator().manual_seed(5))


def fed(modifier: Modifier[Any], *, batches: int = 3) -> Any:
    generator = torch.Generator().manual_seed(6)
    statistic = modifier.statistic(SHAPE)
    for _ in range(batches):
        statistic.update(torch.randn(2, 5, SHAPE.d_in, generator=generator) * torch.arange(1, SHAPE.d_in + 1))
    return statistic


def test_a_weight_of_zeros_and_inputs_of_zeros(modifier: Modifier[Any]) -> None:
    statistic = modifier.statistic(SHAPE)
    for _ in range(4):
        statistic.update(torch.zeros(2, 5, SHAPE.d_in))
    for values, inputs in ((torch.zeros(SHAPE.d_out, SHAPE.d_in), fed(modifier, batches=4)), (weight(), statistic)):
        outcome = modifier.solve(SHAPE, values, inputs, None)
        stored = modifier.loss(values, inputs, outcome.weight)
        assert all(map(math.isfinite, (*outcome.losses, stored)))
        assert values.any() or not (outcome.weight.any() or any(outcome.losses))


def test_every_modifier_has_an_example() -> None:
    assert set(EXAMPLES) == set(modifiers()) - OTHER_KINDS


def test_the_registry_is_sorted_and_read_only() -> None:
    assert list(modifiers()) == sorted(modifiers())
    with pytest.raises(TypeError):
        modifiers()["X"] = Modifier  # type: ignore[index]


@pytest.mark.parametrize("name", config_types())
def test_the_config_is_frozen_and_described(name: str) -> None:
    kind = config_types()[name]
    assert issubclass(kind, ModifierConfig)
    assert kind.model_config["frozen"]
    assert kind.model_config["extra"] == "forbid"
    assert kind.__doc__
    for key, field in kind.model_fields.items():
        assert field.title, key
        assert field.description, key
        assert field.description.endswith(".")
    fields: dict[str, Any] = {"targets": ("Linear",), **REQUIRED.get(name, next(iter(EXAMPLES.get(name, [])), {}))}
    config = kind(**fields)
    with pytest.raises(pydantic.ValidationError):
        config.seed = 5
    with pytest.raises(pydantic.ValidationError):
        kind(**fields, blok_size=32)
    assert kind.model_validate(config.model_dump()) == config
    assert hash(config) == hash(kind(**fields))


def test_the_class_declares_itself(modifier: Modifier[Any]) -> None:
    kind = type(modifier)
    assert isinstance(kind.category, str)
    assert kind.category
    assert kind.__doc__
    rules = (kind.cannot_follow, kind.needs_before, kind.needs_after)
    assert all(isinstance(reason, str) and reason for rule in rules for reason in rule.values())
    assert kind.category in modifier.words
    assert isinstance(modifier.poor_after(modifier, ()), str)


def test_a_plan_is_made_of_whole_bytes(modifier: Modifier[Any]) -> None:
    cost = modifier.plan(SHAPE)
    assert isinstance(cost, Estimate)
    assert isinstance(cost.stored_bytes, int)
    assert isinstance(cost.factor_bytes, int)
    assert 0 <= cost.factor_bytes < cost.stored_bytes
    assert cost.flops >= 0
    assert cost.peak_bytes > 0
    assert (cost.block_size is None) == (cost.factor_bytes == 0)
    if cost.block_size is not None:
        assert (SHAPE.d_out % cost.block_size[0], SHAPE.d_in % cost.block_size[1]) == (0, 0)
    assert modifier.plan(SHAPE) == cost


@pytest.mark.parametrize("shape", [(16, 6), (16, 7), (16, 1), (1, 2)])
def test_shapes_that_two_of_four_does_not_fit_are_refused_by_name(
    modifier: Modifier[Any], shape: tuple[int, int]
) -> None:
    with pytest.raises(PlanError, match=r"model\.odd.*`ignore`"):
        modifier.plan(ModuleShape("model.odd", *shape, 2))


def test_statistics_count_tokens_and_do_not_share_state(modifier: Modifier[Any]) -> None:
    one, two = fed(modifier), modifier.statistic(SHAPE)
    assert (one.tokens, two.tokens) == (30, 0)


def test_a_solve_keeps_its_contract(modifier: Modifier[Any]) -> None:
    w, statistic = weight(), fed(modifier)
    calls: list[tuple[int, int, float]] = []
    outcome = modifier.solve(SHAPE, w, statistic, lambda *call: calls.append(call))
    assert isinstance(outcome, Outcome)
    assert outcome.weight.shape == w.shape
    assert outcome.weight.dtype == torch.float32
    assert bool(outcome.weight.isfinite().all())
    assert outcome.losses
    assert all(b <= a for a, b in zip(outcome.losses, outcome.losses[1:], strict=False))
    assert outcome.losses[-1] == pytest.approx(modifier.loss(w, statistic, outcome.weight), rel=1e-4)
    assert outcome.stop_reason
    assert all(isinstance(count, int) for count in outcome.counts.values())
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert all(0 < done <= at_most and loss <= outcome.losses[0] for done, at_most, loss in calls)


def test_the_result_is_two_of_four(modifier: Modifier[Any]) -> None:
    outcome = modifier.solve(SHAPE, weight(), fed(modifier), None)
    factors = outcome.factorization
    core = outcome.weight if factors is None else factors.core
    assert int((core.view(SHAPE.d_out, -1, 4) != 0).sum(-1).max()) <= 2
    if factors is not None:
        assert (factors.mask.view(SHAPE.d_out, -1, 4).sum(-1) == 2).all()
        assert not bool(factors.core[~factors.mask].any())
        assert torch.equal(outcome.weight, fold(factors.a, factors.core, factors.b))
        assert (factors.a.shape[-1], factors.b.shape[-1]) == modifier.plan(SHAPE).block_size


def test_losses_are_relative(modifier: Modifier[Any]) -> None:
    w, statistic = weight(), fed(modifier)
    assert modifier.loss(w, statistic, torch.zeros_like(w)) == pytest.approx(1)
    assert modifier.loss(w, statistic, w) == pytest.approx(0, abs=1e-12)


def test_inputs_and_global_generators_are_left_alone(modifier: Modifier[Any]) -> None:
    w, statistic = weight(), fed(modifier)
    value, before = statistic.value.clone(), rng_states()
    config = copy.deepcopy(modifier.config)
    state = dict(modifier.__dict__)
    modifier.solve(SHAPE, w, statistic, None)
    assert torch.equal(w, weight())
    assert torch.equal(statistic.value, value)
    assert rng_states() == before
    assert modifier.config == config
    assert modifier.__dict__ == state


def test_solving_again_gives_the_same_bits_whatever_the_global_generator_says(modifier: Modifier[Any]) -> None:
    first = modifier.solve(SHAPE, weight(), fed(modifier), None)
    with torch.random.fork_rng():
        torch.manual_seed(987)
        again = modifier.solve(SHAPE, weight(), fed(modifier), None)
    assert torch.equal(first.weight, again.weight)
    assert first.losses == again.losses


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_of_any_dtype_are_solved_in_full(modifier: Modifier[Any], dtype: torch.dtype) -> None:
    w = weight().to(dtype)
    outcome = modifier.solve(SHAPE, w, fed(modifier), None)
    assert outcome.weight.dtype == torch.float32
    assert torch.equal(outcome.weight, modifier.solve(SHAPE, w.float(), fed(modifier), None).weight)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite_are_refused(modifier: Modifier[Any], bad: float) -> None:
    w = weight()
    w[3, 3] = bad
    with pytest.raises(NumericalError):
        modifier.solve(SHAPE, w, fed(modifier), None)
    statistic = fed(modifier)
    statistic.update(torch.full((1, SHAPE.d_in), bad))
    with pytest.raises(NumericalError, match=r"model\.layers\.0\.mlp\.up_proj"):
        modifier.solve(SHAPE, weight(), statistic, None)


def test_no_input_at_all_is_refused(modifier: Modifier[Any]) -> None:
    with pytest.raises(NumericalError, match="no calibration token"):
        modifier.solve(SHAPE, weight(), fed(modifier, batches=0), None)


def test_the_seed_is_the_modules_own() -> None:
    from armor_recipes.modifiers.seeding import module_seed

    seeds = {module_seed(seed, name) for seed in (0, 1, 2**62) for name in ("a", "b", "")}
    assert len(seeds) == 9
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert module_seed(0, "model.layers.0") == module_seed(0, "model.layers.0")


def test_calibration_is_part_of_the_config() -> None:
    spec = CalibrationSpec(dataset="builtin:random-tokens")
    for name, kind in config_types().items():
        fields: dict[str, Any] = REQUIRED.get(name, next(iter(EXAMPLES.get(name, [])), {}))
        assert kind(targets=("Linear",), calibration=spec, **fields).calibration == spec
