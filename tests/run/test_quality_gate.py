"""`evaluation.max_perplexity_ratio`, `max_kl_divergence`: what is worse fails with exit code 8, complete and beside its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from armor_recipes import apply, load
from armor_recipes.errors import InputError, QualityError, RecipeError
from armor_recipes.evaluation import Evaluation, Measurement, Value
from armor_recipes.events import PhaseStarted
from armor_recipes.modifiers import config_types
from armor_recipes.recipe import load_recipe_mapping
from armor_recipes.run.evaluating import check_quality
from tests.support.engine import MLP, logits, make_model, recipe, save_model
from tests.support.tokenizers import byte_tokenizer

RANDOM = {"dataset": "builtin:random-tokens", "samples": 2, "sequence_length": 8}


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    """A recipe on a model of tokens that letters have."""
    byte_tokenizer().save_pretrained(save_model(tmp_path / "m"))
    (tmp_path / "letters.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 9)  # whose ids are below 96
    measured = {"dataset": str(tmp_path / "letters.txt"), "sequence_length": 32, "windows": 2}
    return {**recipe(tmp_path / "m", tmp_path / "out"), "evaluation": {"perplexity": measured}}


def bound(given: dict[str, Any], ratio: float, **others: Any) -> dict[str, Any]:
    return {**given, "evaluation": {**given["evaluation"], **others, "max_perplexity_ratio": ratio}}


def test_what_is_within_the_bound_is_put_in_place(given: dict[str, Any]) -> None:
    result = apply(bound(given, 50))
    assert result.perplexity_before is not None
    assert result.perplexity_after is not None
    ratio = result.perplexity_after.value / result.perplexity_before.value
    assert apply(bound(given, ratio * 1.0001), overwrite=True).output == result.output
    with pytest.raises(QualityError):
        apply(bound(given, ratio * 0.9999), overwrite=True)


def test_what_is_not_is_kept_aside(given: dict[str, Any], tmp_path: Path) -> None:
    before = apply(given)
    there = (before.output / "armor_manifest.json").read_bytes()
    for place in ("out.rejected", "out.rejected-2"):
        with pytest.raises(QualityError) as raised:
            apply(bound(given, 0.001, fidelity=RANDOM), overwrite=True)
        told = str(raised.value)
        assert before.perplexity_before is not None
        assert before.perplexity_after is not None
        assert f"is {before.perplexity_after.value:.4g} after and {before.perplexity_before.value:.4g} before" in told
        assert "max_perplexity_ratio allows 0.001" in told
        assert told.endswith(f"what was written is complete and kept in {tmp_path / place}")
        kept = tmp_path / place
        assert json.loads((kept / "report.json").read_text())["seconds"] > 0
        assert json.loads((kept / "armor_manifest.json").read_text())["evaluation"]["after"]["perplexity"] > 0
        assert torch.equal(logits(load(kept)), logits(load(before.output)))
    assert (before.output / "armor_manifest.json").read_bytes() == there


def test_a_compressed_model_is_held_against_itself(given: dict[str, Any], tmp_path: Path) -> None:
    first = apply(given).output
    again = bound({**given, "model": str(first), "output": {"path": str(tmp_path / "again")}}, 0.5)
    ints = {"config_groups": {"core": {"weights": {"num_bits": 8, "strategy": "channel"}}}, "targets": [MLP]}
    again["prune_stage"] = {"armor_modifiers": {"QuantizationModifier": ints}}
    with pytest.raises(QualityError, match=r"again\.rejected$"):
        apply(again)
    again["evaluation"]["max_perplexity_ratio"] = 2
    assert (apply(again).output / "config.json").is_file()


@pytest.mark.parametrize("evaluation", [{}, {"fidelity": RANDOM}])
def test_a_bound_without_perplexity_is_refused(given: dict[str, Any], evaluation: dict[str, Any]) -> None:
    with pytest.raises(
        RecipeError, match=r"evaluation: max_perplexity_ratio compares perplexity after with that before"
    ):
        apply({**given, "evaluation": {**evaluation, "max_perplexity_ratio": 2}})


@pytest.mark.parametrize("ratio", [0, -1, "two", float("inf"), True])
def test_what_is_no_ratio_is_refused(given: dict[str, Any], ratio: Any) -> None:
    with pytest.raises(RecipeError, match=r"max_perplexity_ratio"):
        apply(bound(given, ratio))


def test_a_bound_on_divergence(given: dict[str, Any], tmp_path: Path) -> None:
    def within(highest: float, **keys: Any) -> dict[str, Any]:
        return {**given, "evaluation": {"fidelity": {**RANDOM, **keys}, "max_kl_divergence": highest}}

    after = apply(within(50)).evaluations[0].after
    assert isinstance(after, Measurement)
    divergence = after["kl_divergence"].value
    assert divergence > 0
    assert apply(within(divergence), overwrite=True).output == tmp_path / "out"
    with pytest.raises(QualityError) as raised:
        apply(within(divergence * 0.9999), overwrite=True)
    assert f"the KL divergence to the dense model on builtin:random-tokens is {divergence:.4g} [" in str(raised.value)
    assert str(raised.value).endswith(f"what was written is complete and kept in {tmp_path / 'out.rejected'}")
    assert (tmp_path / "out.rejected" / "armor_manifest.json").is_file()


@pytest.mark.parametrize("others", [{}, {"fidelity": {**RANDOM, "output": "last_hidden_state"}}])
def test_a_bound_on_divergence_without_fidelity_is_refused(given: dict[str, Any], others: dict[str, Any]) -> None:
    evaluation = {**given["evaluation"], **others, "max_kl_divergence": 1}
    with pytest.raises(RecipeError, match="evaluation: max_kl_divergence is a bound on what `fidelity` measures"):
        apply({**given, "evaluation": evaluation})


def test_a_model_without_logits_is_refused_before_it_is_compressed(given: dict[str, Any], tmp_path: Path) -> None:
    make_model().base_model.bfloat16().save_pretrained(tmp_path / "base")
    evaluation = {"fidelity": RANDOM, "max_kl_divergence": 1}
    targets = {
        "prune_stage": {
            "a_modifiers": {"ARMORModifier": {"targets": "preset:all-linear", "block_size": 8, "iterations": 1}}
        }
    }
    phases: list[Any] = []
    with pytest.raises(InputError, match="the model gives no output 'logits'; it gives last_hidden_state"):
        apply({**given, **targets, "model": str(tmp_path / "base"), "evaluation": evaluation}, observer=phases.append)
    assert PhaseStarted("compress") not in phases


def test_a_bound_on_divergence_of_a_model_without_logits(given: dict[str, Any]) -> None:
    recipe = load_recipe_mapping(
        {**given, "evaluation": {"fidelity": RANDOM, "max_kl_divergence": 1}}, registry=config_types()
    )
    after = Measurement((Value("cosine", 1.0),), ("d",), 1, "")
    with pytest.raises(QualityError, match="is a bound on logits, and the model gives none"):
        check_quality(recipe, [Evaluation("fidelity", None, after)])


@pytest.mark.parametrize("highest", [0, -1, "two", float("inf"), True])
def test_what_is_no_divergence_is_refused(given: dict[str, Any], highest: Any) -> None:
    with pytest.raises(RecipeError, match="max_kl_divergence"):
        apply({**given, "evaluation": {"fidelity": RANDOM, "max_kl_divergence": highest}})
