"""One list of checks that every registered modifier of every kind goes through in a session, with each of its options."""

from __future__ import annotations

import json
import math
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import pytest
import torch
from torch import Tensor, nn

from armor_recipes.modifiers import config_types, modifiers
from armor_recipes.modifiers.kinds.changes import Changes
from armor_recipes.run import Job
from armor_recipes.session import Session
from armor_recipes.session import session as loop
from armor_recipes.session.commit import commit
from tests.support.engine import ALL, ARMOR, MLP, core, hook_count, make_job, make_session, recipe, rng_states

DOWN = r"re:.*mlp\.down_proj$"
SMALL: dict[str, Any] = {"targets": [ALL], "block_size": 8, "iterations": 2}
TRAINED: dict[str, Any] = {"epochs": 1, "held_out": 0.4}
BEFORE: dict[str, dict[str, Any]] = {"ARMORModifier": ARMOR}
#: Fields of each modifier, at least every value of every choice. A modifier or choice that is missing fails below.
OPTIONS: dict[str, list[dict[str, Any]]] = {
    "ARMORModifier": [
        SMALL,
        {**SMALL, "block_size": [4, 8], "propagate": "dense"},
        {**SMALL, "propagate": "matched", "shrinkage": 0.1},
        {**SMALL, "block_size": "auto", "solver": "adam"},
        {**SMALL, "objective": "hessian", "shrinkage": "auto"},
        {**SMALL, "normalize": False, "share_input_factor": True},
        {**SMALL, "gradient_power": 0.5, "objective": "hessian", "propagate": "matched"},
        {**SMALL, "pattern": "1:4"},
    ],
    "MagnitudeModifier": [{"targets": [ALL]}, {"targets": [ALL], "propagate": "dense", "adapter_block": 4}],
    "NoWagModifier": [{"targets": [ALL]}, {"targets": [ALL], "propagate": "dense", "pattern": "4:8"}],
    "SparseGPTModifier": [
        {"targets": [ALL], "pattern": "2:4"},
        {"targets": [ALL], "mask_structure": "2:4", "propagate": "dense", "adapter_block": 4},
        {"targets": [ALL], "sparsity": 0.5, "preserve_sparsity_mask": True},
    ],
    "WandaPruningModifier": [
        {"targets": [ALL], "pattern": "2:4"},
        {"targets": [r"re:.*mlp$"], "sparsity": 0.5, "propagate": "dense"},
    ],
    "QuantizationModifier": [
        core(targets=[MLP]),
        core(4, 16, targets=[MLP], propagate="dense"),
        core(targets=[MLP], resolve=False, gauge=False, objective="hessian"),
        core(targets=[MLP], objective="hessian", rounding="gptq"),
        core(targets=[MLP], rounding="nearest"),
    ],
    "GPTQModifier": [
        {"targets": [MLP], "config_groups": {"g": {"weights": {"group_size": -1}}}},
        {"targets": [MLP], "actorder": None, "config_groups": {"g": {"weights": {"num_bits": 4, "group_size": 16}}}},
    ],
    "BlockRefineModifier": [
        TRAINED,
        {**TRAINED, "optimizer": "muon", "core": True, "norms": False},
        {**TRAINED, "accumulate": 1},
    ],
    "DistillationModifier": [
        TRAINED,
        {**TRAINED, "optimizer": "muon", "core": True, "norms": False, "compute_dtype": "float32"},
        {**TRAINED, "hidden_layers": "all", "compute_dtype": "bfloat16"},
        {**TRAINED, "hidden_layers": 0},
    ],
    "SmoothQuantModifier": [{}, {"mappings": [[[r"re:.*(gate|up)_proj"], r"re:.*post_attention_layernorm"]]}],
    "AWQModifier": [
        {"n_grid": 4},
        {"n_grid": 4, "duo_scaling": "both", "propagate": "dense"},
        {"n_grid": 2, "duo_scaling": False, "mappings": [[r"re:.*up_proj", [r"re:.*down_proj"]]]},
    ],
    "ChannelPermutationModifier": [
        {"targets": [DOWN]},
        {"targets": [DOWN, r"re:.*o_proj$"], "propagate": "dense", "block_size": 8},
    ],
}
#: What stands before and after a modifier in its recipe, by kind or by its own name.
AROUND: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Solving": ({}, {}),
    "Quantizing": (BEFORE, {}),
    "Refining": (BEFORE, {}),
    "Rearranging": ({}, {"NoWagModifier": {"targets": [MLP]}}),
    "Smoothing": ({}, {"NoWagModifier": {"targets": [ALL]}}),
    "GPTQModifier": ({}, {}),
    "AWQModifier": ({}, {"GPTQModifier": {"targets": [ALL], "config_groups": {"g": {"weights": {"group_size": -1}}}}}),
}
CASES = [(name, index) for name, fields in OPTIONS.items() for index in range(len(fields))]
case = pytest.mark.parametrize(("name", "index"), CASES, ids=[f"{name}-{index}" for name, index in CASES])


def mapping(llama: Path, name: str, index: int) -> dict[str, Any]:
    before, after = AROUND.get(name) or AROUND[type(modifiers()[name].kind).__name__]
    return recipe(llama, **{**before, name: OPTIONS[name][index], **after})


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def run(job: Job) -> Session:
    with make_session(job) as session:
        session.run()
    return session


@dataclass(frozen=True)
class Ran:
    """A job's first run, and what was around it."""

    job: Job
    session: Session
    parameters: dict[str, Tensor]
    states: tuple[object, object]
    states_after: tuple[object, object]


@pytest.fixture(scope="module", params=CASES, ids=[f"{name}-{index}" for name, index in CASES])
def ran(request: pytest.FixtureRequest, llama: Path) -> Ran:
    """One run of a case for all tests of it, which leave it as it is."""
    job = make_job(mapping(llama, *request.param))
    session = make_session(job)
    before, states = parameters(session.model), around(job)
    with session:
        session.run()
    return Ran(job, session, before, states, around(job))


def around(job: Job) -> tuple[object, object]:
    """What a run must leave as it is: global generators, and the modifiers of its job."""
    return rng_states(), {key: dict(modifier.__dict__) for key, modifier in job.modifiers.items()}


def choices(annotation: Any) -> set[Any]:
    """Values of a field that is a choice: of each `Literal` in it, and both of a bool."""
    if annotation is bool:
        return {True, False}
    if get_origin(annotation) is Literal:
        return set(get_args(annotation))
    if get_origin(annotation) in (Union, types.UnionType):
        return {value for part in get_args(annotation) for value in choices(part)}
    return set()


#: Of no consequence to a session, or refused there: `optional` says what may match nothing, `unfit` what is not taken.
PASSED_OVER = {"optional", "unfit", "bypass_divisibility_checks"}


@pytest.mark.parametrize("name", modifiers())
def test_every_choice_is_among_the_options(name: str) -> None:
    config = config_types()[name]
    for field, info in config.model_fields.items():
        for value in choices(info.annotation) if field not in PASSED_OVER else ():
            given = [fields.get(field, info.default) for fields in OPTIONS[name]]
            assert value in given, f"{name}.{field}: {value!r} is in no example"


def test_every_kind_is_among_the_modifiers() -> None:
    assert {type(modifier.kind).__name__ for modifier in modifiers().values()} == set(AROUND) - set(modifiers())


@case
def test_the_plan_is_a_value(name: str, index: int, llama: Path) -> None:
    job, again = (make_job(mapping(llama, name, index)) for _ in range(2))
    assert job.plan == again.plan
    assert hash(job.plan) == hash(again.plan)
    assert job.plan.sha256 == again.plan.sha256
    assert {job.plan: 1}[again.plan] == 1
    assert json.dumps(job.plan.to_dict(), allow_nan=False)
    rows = [row for row in job.plan.rows if row.modifier.endswith(name)]
    assert rows
    for row in rows:
        assert row.flops > 0
        assert row.peak_bytes > 0
        assert row.section in job.plan.to_dict()


def test_a_run_is_whole_and_repeatable(ran: Ran, tmp_path: Path, monkeypatch: Any) -> None:
    """The same bits again, with two threads, with changes that were written and read; nothing global or shared is touched."""
    job, first = ran.job, ran.session
    assert ran.states == ran.states_after
    assert hook_count(first.model) == 0
    assert first.model.training is False
    numbers = [n for r in first.results.values() for n in (*r.losses, r.stored_loss, r.error)]
    assert numbers
    assert all(map(math.isfinite, numbers))
    assert json.dumps([r.to_dict() for r in (*first.results.values(), *first.state.results)], allow_nan=False)

    def through_a_file(changes: Changes, *others: Any) -> None:
        changes.save(tmp_path / "changes")
        commit(Changes.load(tmp_path / "changes"), *others)

    monkeypatch.setattr(loop, "commit", through_a_file)
    torch.set_num_threads(2)
    try:
        second = run(job)
    finally:
        torch.set_num_threads(1)
    found = parameters(second.model)
    assert [key for key, value in parameters(first.model).items() if not torch.equal(value, found[key])] == []
    assert [r.to_dict() for r in second.results.values()] == [r.to_dict() for r in first.results.values()]
    assert [r.to_dict() for r in second.state.results] == [r.to_dict() for r in first.state.results]


def test_the_run_is_what_was_planned(ran: Ran) -> None:
    """Weights that change are those of the plan's rows, and norms where a refiner trains them."""
    job, session, before = ran.job, ran.session, ran.parameters
    after = parameters(session.model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    planned = {f"{name}.weight" for name in job.plan.shapes}
    assert planned <= changed | {key for key in planned if not before[key].any()}
    assert all("norm" in key for key in changed - planned)
    for row in job.plan.modules:
        packed = session.results[row.name].packed
        last = [module for module in job.plan.modules if module.name == row.name][-1]
        assert (packed is not None) == (last.spec is not None)
        if packed is not None and last.spec is not None:
            assert packed.block_size == last.spec.block_size
            assert (packed.core, packed.group_size) == (last.spec.core, last.spec.group_size)
