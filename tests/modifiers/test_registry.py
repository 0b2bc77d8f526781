"""Modifiers of other people: registered by a decorator, found through an entry point, run by an engine that knows no names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from engine_samples import ARMOR, ATTENTION, MLP, recipe
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from armor_recipes.errors import PlanError, RecipeError
from armor_recipes.modifiers import Estimate, Modifier, ModuleShape, Outcome, modifiers, register, registry
from armor_recipes.modifiers.base import SolveProgress
from armor_recipes.recipe import json_schema
from armor_recipes.recipe.schema import ModifierConfig
from armor_recipes.run import apply, prepare
from armor_recipes.run.job import read_recipe


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
from test_registry import ToyModifier

@register
class PluggedModifier(ToyModifier):
    "Comes with another package."
"""


def install(monkeypatch: pytest.MonkeyPatch, folder: Path, code: str, name: str) -> None:
    (folder / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    point = EntryPoint(name="plugged", value=name, group=registry.ENTRY_POINT_GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda *, group: [point] if group == point.group else [])
    registry._discover.cache_clear()


def test_an_entry_point_is_found(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, tmp_path, PLUG_IN, "armor_plug_in")
    result = apply(recipe(llama, tmp_path / "out", PluggedModifier={"targets": [MLP]}))
    assert len(result.modules) == 6
    sys.modules.pop("armor_plug_in")


@pytest.mark.parametrize(
    "code",
    ["import nothing_of_this_name", "def broken(:", "raise RuntimeError('no')", PLUG_IN.replace("Plugged", "ARMOR")],
)
def test_a_plug_in_that_does_not_import_is_named(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    install(monkeypatch, tmp_path, code, "armor_broken_plug_in")
    for _ in range(2):  # a failed look is not remembered as a success
        with pytest.raises(
            RecipeError, match=r"plug-in armor_broken_plug_in of entry-point group armor_recipes\.modifiers"
        ):
            read_recipe(recipe(llama))
