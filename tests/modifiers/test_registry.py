"""Modifiers of other people: registered by a decorator, found through an entry point, run by an engine that knows no names."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from armor_recipes.errors import PlanError, RecipeError
from armor_recipes.modifiers import (
    Estimate,
    Modifier,
    ModuleShape,
    Outcome,
    config_types,
    modifiers,
    register,
    registry,
)
from armor_recipes.modifiers.armor import ARMORModifier
from armor_recipes.modifiers.base import SolveProgress
from armor_recipes.recipe import json_schema
from armor_recipes.recipe.schema import ModifierConfig
from armor_recipes.run import apply, prepare
from armor_recipes.run.job import read_recipe
from tests.support.engine import ARMOR, ATTENTION, MLP, recipe


class ToyConfig(ModifierConfig):
    """Multiply each targeted weight by a number."""

    factor: float = Field(default=0.5, title="Factor", description="What to multiply by.")


class RowCount:
    """Counts rows, and keeps their largest entry."""

    def __init__(self) -> None:
        self.tokens = 0
        self.largest = 0.0

    def update(self, x: Tensor) -> None:
        self.tokens += x.flatten(0, -2).shape[0]
        self.largest = max(self.largest, float(x.abs().max()))

    def merge(self, other: RowCount) -> None:
        self.tokens += other.tokens
        self.largest = max(self.largest, other.largest)


class ToyModifier(Modifier[ToyConfig]):
    """What somebody writes who follows the check-list."""

    config_type = ToyConfig
    category: ClassVar[str] = "scale"
    cannot_follow: ClassVar[dict[str, str]] = {"prune": "it would scale what was fitted"}

    def plan(self, module: ModuleShape) -> Estimate:
        return Estimate(stored_bytes=module.dense_bytes, flops=1.0, peak_bytes=1)

    def statistic(self, module: ModuleShape) -> RowCount:
        return RowCount()

    def solve(
        self, module: ModuleShape, weight: Tensor, statistic: RowCount | None, on_progress: SolveProgress | None
    ) -> Outcome:
        return Outcome(weight=weight.float() * self.config.factor, losses=(0.25,), counts={"toys": 1})

    def loss(self, weight: Tensor, statistic: RowCount | None, approximation: Tensor) -> float:
        return float((weight - approximation).norm() / weight.norm())


@pytest.fixture(autouse=True)
def _registry_restored() -> Iterator[None]:
    modifiers()
    before = dict(registry._REGISTERED)
    yield
    registry._REGISTERED.clear()
    registry._REGISTERED.update(before)
    registry._discover.cache_clear()
    for name in ("armor_plug_in", "armor_broken_plug_in", "armor_good_plug_in"):
        sys.modules.pop(name, None)


def test_a_decorator_is_all_it_takes(llama: Path, tmp_path: Path) -> None:
    assert register(ToyModifier) is ToyModifier
    result = apply(recipe(llama, tmp_path / "out", ToyModifier={"targets": [MLP], "factor": 2.0}))
    before, after = load_file(llama / "model.safetensors"), load_file(result.output / "model.safetensors")
    for name, weight in after.items():
        assert torch.equal(weight, before[name] * (2.0 if "mlp" in name else 1.0))
    module = result.modules["model.layers.0.mlp.up_proj"]
    assert (module.tokens, module.stored_loss, dict(module.counts)) == (60, 1.0, {"toys": 1})
    assert "ToyModifier" in str(json_schema({name: kind.config_type for name, kind in modifiers().items()}))


def test_a_modifier_that_needs_no_data_runs_without(llama: Path, tmp_path: Path) -> None:
    register(ToyModifier)
    mapping = recipe(llama, tmp_path / "out", ToyModifier={"targets": [MLP]})
    del mapping["calibration"]
    result = apply(mapping)
    assert {module.tokens for module in result.modules.values()} == {0}


def test_it_shares_a_module_with_another_kind_in_the_order_it_allows(llama: Path, tmp_path: Path) -> None:
    register(ToyModifier)
    both: dict[str, Any] = {"ToyModifier": {"targets": [ATTENTION]}, "ARMORModifier": {**ARMOR, "targets": [ATTENTION]}}
    result = apply(recipe(llama, tmp_path / "out", **both))
    assert len(result.plan.modules) == 16
    assert {module.modifier.rsplit(".", 1)[-1] for module in result.modules.values()} == {"ARMORModifier"}
    with pytest.raises(
        PlanError, match=r"ToyModifier: cannot follow ARMORModifier on .*: it would scale what was fitted"
    ):
        prepare(read_recipe(recipe(llama, **dict(reversed(both.items())))))


def test_its_fields_are_checked_like_ours(llama: Path) -> None:
    register(ToyModifier)
    with pytest.raises(RecipeError, match=r"factr: unknown key; nearest valid key: factor"):
        read_recipe(recipe(llama, ToyModifier={"targets": [MLP], "factr": 2.0}))


def test_an_unknown_modifier_names_the_nearest(llama: Path) -> None:
    with pytest.raises(RecipeError, match="NoWagModifier"):
        read_recipe(recipe(llama, NoWagModifer={"targets": [MLP]}))


def test_a_name_is_given_once() -> None:
    register(ToyModifier)
    other = type("ToyModifier", (ToyModifier,), {"__module__": "somebody.elses"})
    with pytest.raises(ValueError, match=r"ToyModifier of somebody\.elses is already registered by .*test_registry"):
        register(other)
    assert modifiers()["ToyModifier"] is ToyModifier


def test_importing_a_module_twice_is_no_clash() -> None:
    register(ToyModifier)
    register(type("ToyModifier", (ToyModifier,), {"__module__": ToyModifier.__module__}))


PLUG_IN = """
from armor_recipes.modifiers import register
from tests.modifiers.test_registry import ToyModifier

@register
class PluggedModifier(ToyModifier):
    "Comes with another package."
"""


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str, name: str) -> None:
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    point = EntryPoint(name="plugged", value=name, group=registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [point] if group == point.group else [])
    registry._discover.cache_clear()


def test_an_entry_point_is_found(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path, PLUG_IN, "armor_plug_in")
    result = apply(recipe(llama, tmp_path / "out", PluggedModifier={"targets": [MLP]}))
    assert len(result.modules) == 6


def toy(name: str, body: str, bases: str = "ToyModifier") -> str:
    """A plug-in with one good modifier before another one."""
    return f"{PLUG_IN}\n\n@register\nclass {name}({bases}):\n    {body}\n"


BROKEN = {
    "missing import": ("import nothing_of_this_name", "ModuleNotFoundError: No module named 'nothing_of_this_name'"),
    "syntax": ("def broken(:", "SyntaxError: "),
    "raises": ("raise RuntimeError('no\\nline')", "RuntimeError: no line"),
    "exits": ("import sys\nsys.exit(0)", "SystemExit: 0"),
    "name of ours": (
        toy("ARMORModifier", "pass"),
        "ValueError: ARMORModifier of armor_broken_plug_in is already registered",
    ),
    "no modifier": (
        toy("Other", "pass", "object"),
        "TypeError: Other of armor_broken_plug_in is no modifier: it is no subclass",
    ),
    "no class": (PLUG_IN + "\nregister(len)", "TypeError: len of builtins is no modifier: it is no subclass"),
    "abstract": (
        "from armor_recipes.modifiers import Modifier\n" + toy("Other", "config_type = None", "Modifier"),
        "TypeError: .*: it does not define loss, plan, solve, statistic",
    ),
    "no config": (
        toy("Other", "config_type = dict"),
        "TypeError: .*: its config_type must be a subclass of ModifierConfig",
    ),
    "no category": (toy("Other", "category = None"), "TypeError: .*: its category must be a word"),
    "no schema": (
        "from armor_recipes.recipe.schema import ModifierConfig\nclass C(ModifierConfig):\n    'X.'\n    f: 'Nowhere'\n"
        + toy("Other", "config_type = C"),
        "Pydantic",
    ),
}


@pytest.mark.parametrize(("code", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_plug_in_that_cannot_be_used_stops_nobody_else(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, reason: str
) -> None:
    install(monkeypatch, tmp_path, code, "armor_broken_plug_in")
    ours = dict(modifiers_with_a_warning(reason))
    assert ours["ARMORModifier"] is ARMORModifier
    assert "PluggedModifier" not in ours  # of a broken plug-in, nothing
    assert read_recipe(recipe(llama)).modifiers  # warns no more
    assert "ARMORModifier" in str(json_schema(config_types()))
    sentence = (
        r"unknown modifier 'PluggedModifier'; .*; the plug-in armor_broken_plug_in of entry-point group "
        rf"armor_recipes\.modifiers cannot be used \({reason}.*\): mend or uninstall it"
    )
    with pytest.raises(RecipeError, match=sentence):
        read_recipe(recipe(llama, PluggedModifier={"targets": [MLP]}))
    with pytest.raises(RecipeError) as raised:  # it says so where a modifier is missing, and nowhere else
        read_recipe(recipe(llama, ARMORModifier={**ARMOR, "iterations": -1}))
    assert "armor_broken_plug_in" not in str(raised.value)


def modifiers_with_a_warning(reason: str) -> Mapping[str, Any]:
    with pytest.warns(RuntimeWarning, match=rf"the plug-in armor_broken_plug_in .*{reason}") as warned:
        found = modifiers()
    assert len(warned) == 1
    return found


def test_a_broken_plug_in_and_a_good_one(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path, "raise RuntimeError", "armor_broken_plug_in")
    (tmp_path / "armor_good_plug_in.py").write_text(PLUG_IN)
    points = [EntryPoint(name, f"armor_{name}_plug_in", registry.ENTRY_POINT_GROUP) for name in ("broken", "good")]
    monkeypatch.setattr(registry, "entry_points", lambda *, group: points)
    assert "PluggedModifier" in modifiers_with_a_warning("RuntimeError")


def test_an_attribute_that_a_plug_in_does_not_have_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path, "", "armor_broken_plug_in")
    point = EntryPoint("x", "armor_broken_plug_in:Missing", registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [point])
    with pytest.warns(RuntimeWarning, match=r"armor_broken_plug_in:Missing .* \(AttributeError: "):
        modifiers()
