"""A kind of modifier that the engine has never heard of: this file, and the line that registers its method."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from pydantic import Field
from safetensors.torch import load_file

from armor_recipes.modifiers import AnyModifier, Needs, register, registry
from armor_recipes.modifiers.kinds.changes import Changes, StepResult
from armor_recipes.modifiers.kinds.contract import BlockContext, Kind, Planned, Planning, Row, Unit
from armor_recipes.recipe.schema import ModifierConfig
from tests.support.commands import Shell
from tests.support.engine import ARMOR, make_job, recipe


class NormScaleConfig(ModifierConfig):
    """Multiply the weights of a block's first norm."""

    factor: float = Field(default=0.5, title="Factor", description="What they are multiplied by.")


@dataclass(frozen=True, slots=True)
class NormPlan(Row):
    """The norm of one block."""

    section: ClassVar[str] = "norms"
    modifier: str
    stage: str
    layer: int
    norm: str
    flops: float = 1.0
    peak_bytes: int = 0


@dataclass(frozen=True, slots=True)
class NormResult(StepResult):
    """What became of it."""

    section: ClassVar[str] = "norms"
    norm: str
    mean: float
    seconds: float


class Scaling(Kind):
    """One step a block, after everything else in it."""

    def plan(self, planning: Planning, modifier: Any) -> Planned:
        rows = (
            NormPlan(planning.entry.key, planning.entry.stage, index, f"{name}.input_layernorm.weight")
            for index, name in enumerate(planning.stacks.names)
        )
        return Planned(tuple(rows))

    def run(self, unit: Unit, context: BlockContext) -> Changes:
        (share,) = unit.shares
        (row,) = share.rows
        value = context.weights.read(row.norm) * share.modifier.config.factor
        context.progress(row)
        return Changes(unit.key, {row.norm: value}, results=(NormResult(row.norm, float(value.mean()), 0.0),))


class NormScaleModifier(AnyModifier[NormScaleConfig]):
    kind = Scaling()
    config_type = NormScaleConfig
    category = "norms"

    @property
    def needs(self) -> Needs:
        return Needs()


@pytest.fixture
def _registered() -> Iterator[None]:
    registry.modifiers()
    before = dict(registry._REGISTERED)
    register(NormScaleModifier)
    yield
    registry._REGISTERED.clear()
    registry._REGISTERED.update(before)


@pytest.mark.usefixtures("_registered")
def test_it_is_planned_run_and_told(llama: Path, tmp_path: Path, shell: Shell) -> None:
    mapping = recipe(
        llama, tmp_path / "out", ARMORModifier=ARMOR, NormScaleModifier={"targets": ["Linear"], "factor": 0.25}
    )
    plan = make_job(mapping).plan
    assert [row["norm"] for row in plan.to_dict()["norms"]] == [
        f"model.layers.{i}.input_layernorm.weight" for i in (0, 1)
    ]
    (tmp_path / "r.yaml").write_text(json.dumps(mapping))
    done = shell("armor-apply", tmp_path / "r.yaml", "--json")
    assert done.code == 0, done.err
    assert [row["norm"] for row in json.loads(done.out)["norms"]] == [row["norm"] for row in plan.to_dict()["norms"]]
    manifest = json.loads((tmp_path / "out" / "armor_manifest.json").read_text())
    assert [sorted(row) for row in manifest["norms"]] == [["mean", "norm"]] * 2
    written, dense = load_file(tmp_path / "out" / "model.safetensors"), load_file(llama / "model.safetensors")
    for row in plan.to_dict()["norms"]:
        assert torch.equal(written[row["norm"]], dense[row["norm"]] * 0.25)


@pytest.mark.usefixtures("_registered")
def test_its_changes_can_be_read_again(tmp_path: Path) -> None:
    found = Changes("a", {"n": torch.ones(3)}, results=(NormResult("n", 1.0, 0.5),))
    found.save(tmp_path / "x")
    assert Changes.load(tmp_path / "x").results == found.results
