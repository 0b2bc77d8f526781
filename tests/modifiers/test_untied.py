"""Output layers that have the weight of the embeddings, quantised as layers of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import armor_recipes
from armor_recipes.checkpoint.reader import inspect, read_config
from armor_recipes.errors import PlanError
from armor_recipes.model.ties import tied_output, untie, untied
from tests.support.engine import ARMOR, MLP, make_job, make_model, recipe, save_model

IDS = torch.arange(12)[None] * 7 % 96
HEAD: dict[str, Any] = {"scheme": "W8A8", "targets": ["Linear"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tied") / "model", "llama-gqa-tied")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(IDS).logits
    return found


@pytest.mark.parametrize("kind", ["QuantizationModifier", "GPTQModifier"])
def test_the_output_layer_is_quantised_and_the_embeddings_stay(kind: str, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = armor_recipes.apply(recipe(model, out, **{kind: HEAD}))
    assert result.plan.untied == ("lm_head",)
    assert any(note.startswith("lm_head has the weight of the embeddings") for note in result.plan.notes)
    assert read_config(out)["tie_word_embeddings"] is False
    assert "lm_head" in {layer.name for layer in inspect(out).plain}
    tensors, source = load_file(out / "model.safetensors"), load_file(model / "model.safetensors")
    embeddings = "model.embed_tokens.weight"
    assert torch.equal(tensors[embeddings], source[embeddings])
    stands_for = tensors["lm_head.weight"].float() * tensors["lm_head.weight_scale"].float()
    weight = source[embeddings].float()
    assert 0 < (stands_for - weight).norm() / weight.norm() < 0.01
    found = logits(armor_recipes.load(out))
    assert torch.equal(found, logits(AutoModelForCausalLM.from_pretrained(out, dtype="auto")))


def test_others_leave_it(model: Path) -> None:
    plan = make_job(recipe(model, QuantizationModifier={**HEAD, "unfit": "skip"})).plan
    assert (plan.untied, [one.name for one in plan.skipped]) == ((), ["lm_head"])
    plan = make_job(recipe(model, QuantizationModifier={**HEAD, "ignore": ["lm_head"]})).plan
    assert (plan.untied, "untied" in plan.to_dict()) == ((), False)
    with pytest.raises(PlanError, match="the weight of lm_head is tied to"):
        make_job(recipe(model, ARMORModifier={**ARMOR, "targets": ["Linear"]}))


def test_a_model_that_was_given_is_untied_as_one_from_files(model: Path, tmp_path: Path) -> None:
    given = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    own = given.config
    armor_recipes.apply(recipe(model, tmp_path / "given", QuantizationModifier=HEAD), model=given)
    armor_recipes.apply(recipe(model, tmp_path / "files", QuantizationModifier=HEAD))
    assert own.tie_word_embeddings is True
    assert given.config.tie_word_embeddings is False
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("given", "files"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_packed_layers_beside_it(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    armor = {**ARMOR, "targets": [MLP]}
    armor_recipes.apply(recipe(model, out, ARMORModifier=armor, QuantizationModifier={**HEAD, "ignore": [MLP]}))
    found = inspect(out)
    assert (len(found.layers), "lm_head" in {layer.name for layer in found.plain}) == (6, True)
    loaded = armor_recipes.load(out, backend="folded")
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(out, dtype="auto")))


def test_only_a_linear_output_with_the_weight_of_an_embedding_is_one() -> None:
    assert tied_output(make_model("llama")) is None
    tied = make_model("llama-gqa-tied")
    assert tied_output(tied) == "lm_head"
    before = logits(tied)
    untie(tied, ("lm_head",))
    assert (tied_output(tied), untied(tied)) == (None, ("lm_head",))
    tied.tie_weights()
    assert tied.lm_head.weight is not tied.model.embed_tokens.weight
    assert torch.equal(logits(tied), before)
