"""Steps change nothing; what they return can be written and read again; and one place commits it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import armor_recipes
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import CheckpointError
from armor_recipes.model.store import InMemory
from armor_recipes.modifiers.kinds.changes import Changes, loaded_weight
from armor_recipes.modifiers.kinds.contract import BlockContext, State, Unit
from armor_recipes.session import session as loop
from armor_recipes.session.commit import commit
from tests.support.engine import ALL, ARMOR, ATTENTION, MLP, core, make_job, make_session, recipe

PACKAGE = Path(armor_recipes.__file__).parent
SMALL = {"epochs": 1, "held_out": 0.4}
#: Recipes that take every kind of step.
RECIPES: dict[str, dict[str, Any]] = {
    "all kinds": {
        "ChannelPermutationModifier": {"targets": [r"re:.*down_proj$"]},
        "ARMORModifier": {**ARMOR, "gradient_power": 0.5},
        "BlockRefineModifier": SMALL,
        "QuantizationModifier": core(targets=[MLP]),
    },
    "matched and distilled": {
        "ARMORModifier": {**ARMOR, "propagate": "matched", "shrinkage": 0.1, "share_input_factor": True},
        # A store that drops what it is given keeps no originals: the dense model is then read at the width of the factors.
        "DistillationModifier": {**SMALL, "compute_dtype": "float32"},
    },
    "quantised": {
        "QuantizationModifier": {
            "config_groups": {"a": {"targets": [MLP], "weights": {"group_size": 32}, "input_activations": {}}}
        },
    },
    "plain and packed": {
        "NoWagModifier": {"targets": [MLP], "propagate": "dense"},
        "ARMORModifier": {**ARMOR, "targets": [ATTENTION], "propagate": "dense"},
    },
}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Watched(InMemory):
    """Writes nothing, and puts what was lent back."""

    written: Sequence[str] = ()

    def write(self, parameter: str, value: Tensor, *, same_function: bool = False) -> None:
        assert self.read(parameter).shape == value.shape
        self.written = [*self.written, parameter]

    def lent(self, parameters: Sequence[str]) -> Any:
        return super().lent(())


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("packed", [True, False])
def test_nothing_but_the_commit_writes(name: str, packed: bool, llama: Path) -> None:
    """With a store that drops what it is given every weight is in the end what it was."""
    modifiers = dict(RECIPES[name])
    if not packed:
        modifiers.pop("QuantizationModifier", None)
    session = make_session(make_job(recipe(llama, **modifiers)), keep_packed=packed)
    session.weights = Watched(session.model, stored_dtype=torch.bfloat16)
    before = parameters(session.model)
    with session:
        session.run()
    assert set(session.weights.written) >= {f"{module}.weight" for module in session.results}
    after = parameters(session.model)
    assert [key for key in before if not torch.equal(before[key], after[key])] == []


def test_only_the_store_touches_parameters() -> None:
    """In the rooms of the engine no other file assigns to a parameter's memory."""
    writes = re.compile(r"\.data\s*=|\.data\.|parameter\.copy_|weight\.copy_|\.copy_\(|nn\.init\.")
    found = {
        path.relative_to(PACKAGE).as_posix()
        for room in ("model", "session", "plan", "modifiers/kinds")
        for path in (PACKAGE / room).glob("*.py")
        if writes.search(path.read_text(encoding="utf-8"))
    }
    assert found == {"model/store.py", "session/gradients.py"}  # the latter fills a tensor of its own
    text = (PACKAGE / "session/gradients.py").read_text(encoding="utf-8")
    assert writes.findall(text) == [".copy_("]
    assert "out.copy_(" in text


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("packed", [True, False])
def test_a_run_whose_changes_are_written_and_read_is_the_same_run(
    name: str, packed: bool, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    modifiers = dict(RECIPES[name])
    if not packed:
        modifiers.pop("QuantizationModifier", None)
    job = make_job(recipe(llama, **modifiers))
    with make_session(job, keep_packed=packed) as plain:
        plain.run()
    keys: list[str] = []

    def through_a_file(changes: Changes, *others: Any) -> None:
        keys.append(changes.step)
        file = tmp_path / f"{len(keys)}.safetensors"
        changes.save(file)
        commit(Changes.load(file), *others)

    monkeypatch.setattr(loop, "commit", through_a_file)
    with make_session(job, keep_packed=packed) as session:
        session.run()
    assert len(keys) == len(set(keys))
    assert all(torch.equal(value, parameters(session.model)[key]) for key, value in parameters(plain.model).items())
    assert {k: v.to_dict() for k, v in session.results.items()} == {k: v.to_dict() for k, v in plain.results.items()}
    assert [r.to_dict() for r in session.state.results] == [r.to_dict() for r in plain.state.results]
    for key, value in plain.state.factors.items():
        for part in fields(PackedLinear):
            mine, other = (getattr(found, part.name) for found in (session.state.factors[key], value))
            assert (mine is None) == (other is None)
            assert mine is None or torch.equal(mine, other)
    assert session.state.sharing == plain.state.sharing


def test_weights_that_factors_give_are_not_written_twice(llama: Path, tmp_path: Path, monkeypatch: Any) -> None:
    taken: list[Changes] = []
    monkeypatch.setattr(loop, "commit", lambda changes, *others: (taken.append(changes), commit(changes, *others)))
    with make_session(make_job(recipe(llama))) as session:
        session.run()
    taken[0].save(tmp_path / "one")
    packed = sum(
        value.nbytes
        for factors in taken[0].factors.values()
        if factors is not None
        for value in (factors.values, factors.bitmask, factors.a, factors.b)
    )
    assert packed < (tmp_path / "one").stat().st_size < packed + 40_000
    for name, factors in taken[0].factors.items():
        assert factors is not None
        assert torch.equal(taken[0].weights[f"{name}.weight"], loaded_weight(factors, torch.float32))


def test_changes_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Changes("a step").step = "another"  # type: ignore[misc]


@pytest.mark.parametrize("damage", [b"", b"\x00" * 64, b"{}" * 50])
def test_a_damaged_file_of_changes_is_told(damage: bytes, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"x does not hold the changes of a step .*; remove it"):
        Changes.load(tmp_path / "x")


def test_a_weight_of_another_shape_is_refused_before_anything_is_written() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    store, before = InMemory(model, stored_dtype=torch.float32), parameters(model)
    changes = Changes("step", weights={"a.weight": torch.zeros(2, 2), "b.weight": torch.zeros(2, 3)})
    with pytest.raises(ValueError, match=r"step: b.weight is \(2, 2\), and \(2, 3\) was to be written"):
        commit(changes, store, State())
    assert all(torch.equal(value, before[name]) for name, value in parameters(model).items())


def test_originals_are_kept_of_what_changes_the_function() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    store, before = InMemory(model, stored_dtype=torch.bfloat16), parameters(model)
    store.keep_originals(True)
    store.write("a.weight", torch.ones(2, 2))
    store.write("a.weight", torch.zeros(2, 2))
    store.write("b.weight", torch.ones(2, 2), same_function=True)
    assert store.originals.keys() == {"a.weight"}
    assert torch.equal(store.originals["a.weight"], before["a.weight"])  # float32: bfloat16 does not hold it
    store.keep_originals(False)
    store.write("b.weight", torch.zeros(2, 2))
    assert not store.originals


def test_a_step_that_fails_leaves_what_was_committed_before(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps before it are whole, and nothing of it is written."""
    session = make_session(make_job(recipe(llama, ARMORModifier={**ARMOR, "targets": [ALL]})))
    before = parameters(session.model)
    kind = next(iter(session.modifiers.values())).kind
    real = kind.run

    def fail(unit: Unit, context: BlockContext) -> Changes:
        if context.index == 1:
            raise RuntimeError("here")
        return real(unit, context)

    monkeypatch.setattr(kind, "run", fail)
    with session, pytest.raises(RuntimeError, match="here"):
        session.run()
    after = parameters(session.model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        f"{name}.weight" for name in session.results
    }
    assert {name.split(".")[2] for name in session.results} == {"0"}
