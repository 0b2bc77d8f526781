"""What is refused of a model, a tokenizer or a folder before anything is computed or changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MarianConfig, MarianMTModel, PreTrainedModel

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


def test_a_table_that_is_never_saved_and_was_rounded_is_told_before_anything_is_computed(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {
        f"{part}_{size}": 1 for part in ("encoder", "decoder") for size in ("layers", "attention_heads")
    }
    ids: dict[str, Any] = dict.fromkeys(
        ("pad_token_id", "decoder_start_token_id", "eos_token_id", "forced_eos_token_id"), 0
    )
    config = MarianConfig(vocab_size=96, d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, **sizes, **ids)
    MarianMTModel(config).bfloat16().save_pretrained(tmp_path / "m")
    given = MarianMTModel.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    entry = {"targets": [r"re:.*fc1$"]}
    mapping = recipe(tmp_path / "m", tmp_path / "out", MagnitudeModifier=entry)
    mapping["calibration"]["dataset"] = "builtin:random-inputs"
    said = r"encoder\.embed_positions\.weight in torch\.bfloat16, which is not saved: a loader makes it anew in torch\.float32"
    events: list[Event] = []
    with pytest.raises(PlanError, match=said + r".*set model\.compute_dtype to bfloat16"):
        apply(mapping, given, observer=events.append)
    assert [event.name for event in events if isinstance(event, PhaseStarted)] == ["preflight", "tokenize"]
    apply(mapping, given, overrides=["model.compute_dtype=bfloat16"], overwrite=True)
    full = MarianMTModel.from_pretrained(tmp_path / "m", dtype=torch.float32)
    apply(mapping, full, overwrite=True)
    assert read_header(tmp_path / "out")["model.shared.weight"].dtype == "BF16"


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
