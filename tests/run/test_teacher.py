"""Refiners of a compressed model train against the dense one that `model.teacher` names, as in the recipe that compressed it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import armor_recipes
from armor_recipes.errors import PlanError
from tests.support import theirs
from tests.support.engine import MLP, core, make_job, recipe

ARMOR = {"targets": [MLP], "block_size": 8, "iterations": 2, "propagate": "dense"}
TRAINING = {"epochs": 2, "learning_rate": 1e-3}
MORE = {"dataset": "builtin:random-tokens", "samples": 32, "sequence_length": 12, "batch_size": 2}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return theirs.dense(tmp_path_factory.mktemp("dense") / "model")


@pytest.fixture(scope="module")
def packed(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "model"
    armor_recipes.apply(recipe(dense, out, ARMORModifier=ARMOR))
    return out


def taught(
    model: Path, teacher: Path | None, output: Path | str = "out", **modifiers: Mapping[str, Any]
) -> dict[str, Any]:
    named = {} if teacher is None else {"teacher": str(teacher)}
    return {**recipe(model, output, **modifiers), "model": {"id": str(model), **named}}


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_distillation_gives_the_bytes_of_one_recipe(dense: Path, packed: Path, tmp_path: Path) -> None:
    refiner = {"DistillationModifier": {"epochs": 4, "learning_rate": 3e-4, "calibration": MORE}}
    one = armor_recipes.apply(recipe(dense, tmp_path / "one", ARMORModifier=ARMOR, **refiner))
    two = armor_recipes.apply(taught(packed, dense, tmp_path / "two", **refiner))
    assert two.refinements[0].losses == one.refinements[0].losses
    assert min(two.refinements[0].losses) < two.refinements[0].losses[0]
    before, after = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_quantised_core_is_trained_around_as_in_one_recipe(dense: Path, tmp_path: Path) -> None:
    entries = {"ARMORModifier": ARMOR, "QuantizationModifier": {"targets": [MLP], **core(4, 32)}}
    refiner = {"DistillationModifier": {"epochs": 4, "learning_rate": 3e-4, "calibration": MORE}}
    armor_recipes.apply(recipe(dense, tmp_path / "int4", **entries))
    one = armor_recipes.apply(recipe(dense, tmp_path / "one", **entries, **refiner))
    two = armor_recipes.apply(taught(tmp_path / "int4", dense, tmp_path / "two", **refiner))
    assert two.refinements[0].losses == one.refinements[0].losses
    assert min(two.refinements[0].losses) < two.refinements[0].losses[0]
    start, before, after = (tensors(tmp_path / name) for name in ("int4", "one", "two"))
    assert before.keys() == after.keys() == start.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    integers = [name for name in start if name.endswith((".weight_packed", ".bitmask", ".weight_scale"))]
    assert integers
    assert all(torch.equal(start[name], before[name]) for name in integers)


def test_layers_are_refined_as_in_one_recipe(dense: Path, packed: Path, tmp_path: Path) -> None:
    """Statistics come by passes of the teacher as a whole, which are counted."""
    refiner = {"BlockRefineModifier": TRAINING}
    one = armor_recipes.apply(recipe(dense, tmp_path / "one", ARMORModifier=ARMOR, **refiner))
    two = armor_recipes.apply(taught(packed, dense, tmp_path / "two", **refiner))
    for ours, wanted in zip(two.refinements, one.refinements, strict=True):
        assert ours.losses == pytest.approx(wanted.losses, rel=1e-4)
    before, after = tensors(tmp_path / "one"), tensors(tmp_path / "two")
    assert all(torch.allclose(value.float(), after[name].float(), atol=0.01) for name, value in before.items())
    assert [row.reason for row in two.results if row.section == "passes_of_the_whole_model"] == [
        "the dense model is the teacher"
    ]


def refusal(mapping: Mapping[str, Any]) -> str:
    with pytest.raises(PlanError) as error:
        make_job(mapping)
    return str(error.value)


def test_what_does_not_fit_is_refused(dense: Path, packed: Path, tmp_path: Path) -> None:
    refiner: dict[str, Any] = {"DistillationModifier": TRAINING}
    assert "name the one that it was made from as model.teacher" in refusal(taught(packed, None, **refiner))
    assert f"{dense} is a dense one here: leave it out" in refusal(taught(dense, dense, ARMORModifier=ARMOR))
    assert "is compressed, too: name the dense model" in refusal(taught(packed, packed, **refiner))
    other = {"ARMORModifier": {**ARMOR, "targets": [r"re:.*q_proj$"], "propagate": "matched"}}
    assert "take `propagate: compressed`" in refusal(taught(packed, dense, **other))
    armor_recipes.apply(recipe(packed, tmp_path / "int8", QuantizationModifier={"targets": [MLP], **core(8)}))
    told = refusal(taught(tmp_path / "int8", dense, DistillationModifier={**TRAINING, "core": True}))
    assert "the core of model.layers.0.mlp.gate_proj is int8 in the model, whose numbers stay as they are" in told


def test_another_model_is_no_teacher(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(theirs.SIZES, "intermediate_size", 64)
    other = theirs.dense(tmp_path / "other")
    told = refusal(taught(packed, other, DistillationModifier=TRAINING))
    assert "is another model than" in told
    assert "model.layers.0.mlp.down_proj.weight and 5 more differ ((64, 64), (64, 128))" in told
