"""What is refused of a model, a tokenizer or a folder before anything is computed or changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from armor_recipes.checkpoint.files import read_header
from armor_recipes.errors import CheckpointError, InputError, PlanError
from armor_recipes.events import Event, PhaseStarted
from armor_recipes.integrations import models
from armor_recipes.integrations.models import open_model
from armor_recipes.recipe.schema import ModelSpec
from armor_recipes.run import apply, job
from tests.support.engine import ARMOR, make_model, recipe, save_model


def inconsistent(model: PreTrainedModel) -> None:
    assert model.generation_config is not None
    model.generation_config.do_sample, model.generation_config.temperature = False, 0.3


def shared(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight


def tied(model: PreTrainedModel) -> None:
    model.lm_head.weight = model.model.embed_tokens.weight


@pytest.mark.parametrize(
    ("change", "kind", "said"),
    [
        (inconsistent, InputError, r"cannot be saved \(ValueError: GenerationConfig is invalid.*temperature"),
        (shared, PlanError, r"one tensor for model.layers.0.mlp.up_proj.weight and model.layers.1.mlp.up_proj.weight"),
        (tied, PlanError, r"one tensor for lm_head.weight and model.embed_tokens.weight|and lm_head.weight"),
    ],
)
def test_a_model_given_that_cannot_be_written_is_left_as_it_was(
    llama: Path, tmp_path: Path, change: Callable[[PreTrainedModel], None], kind: type[Exception], said: str
) -> None:
    model = make_model()
    change(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(kind, match=said):
        apply(recipe(llama, tmp_path / "out"), model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_given_that_saves_nothing(llama: Path, tmp_path: Path) -> None:
    class Bare:
        """What can only encode."""

    events: list[Event] = []
    with pytest.raises(InputError, match=r"the tokenizer of .* cannot be saved \(AttributeError: .*save_pretrained"):
        apply(recipe(llama, tmp_path / "out"), tokenizer=Bare(), observer=events.append)
    assert [event.name for event in events if isinstance(event, PhaseStarted)] == ["preflight", "tokenize"]
    assert list(tmp_path.iterdir()) == []


def test_damaged_weights_are_told_before_they_are_loaded(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(job, "load_model", never)
    folder = save_model(tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        apply(recipe(folder, tmp_path / "out"))


def test_the_output_is_where_it_was_when_the_run_began(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def leave(event: Event) -> None:
        if event == PhaseStarted("save"):
            monkeypatch.chdir(tmp_path / "there")

    mapping: dict[str, Any] = recipe(llama, "out", ARMORModifier={**ARMOR, "iterations": 0})
    assert apply(mapping, observer=leave).output == Path("out")
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["out"]
    assert list((tmp_path / "there").iterdir()) == []


def test_an_output_in_the_models_own_folder_does_not_count_its_lock_among_the_files(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "m")
    (folder / "notes.md").write_text("mine")
    result = apply(recipe(folder, folder / "out", ARMORModifier={**ARMOR, "iterations": 0}))
    assert [name for name in result.report["left_out"] if not name.startswith(("model", "config", "gen"))] == [
        "notes.md"
    ]


@pytest.mark.parametrize("single", [True, False])
def test_a_hub_model_of_which_some_files_are_still_to_come(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single: bool
) -> None:
    """An index whose files are not all in the hub's cache is no damage: loading fetches them. In a folder of one's own it is."""
    source = open_model(ModelSpec(id=str(llama)), device=torch.device("cpu"))
    index = {"weight_map": dict.fromkeys(read_header(llama), "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError):
        replace(source, location=str(tmp_path)).stored()
    monkeypatch.setattr(models, "_cached_snapshot", lambda *_: tmp_path)
    remote = replace(source, location="org/model")
    assert remote.stored() is None
    name = "model.safetensors" if single else "model-00001-of-00001.safetensors"
    (tmp_path / name).write_bytes((llama / "model.safetensors").read_bytes())
    found = remote.stored()
    assert found is not None
    assert found.tensors.keys() == read_header(llama).keys()
    assert remote.stored() is found
