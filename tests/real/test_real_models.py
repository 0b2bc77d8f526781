"""Real models, where they were fetched: what they are, and what a short recipe leaves of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from armor_recipes.evaluation import Measurement
from armor_recipes.evaluation.perplexity import evaluate
from armor_recipes.integrations.transformers import load
from armor_recipes.recipe.schema import PerplexitySpec
from armor_recipes.run import apply
from armor_recipes.run.result import Result
from tests.support.browser import CHROMIUM, browser, look

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

MODELS = Path(__file__).parents[2] / "models"
#: Two layers: a test of the way, not of the figures.
BERT = r"re:encoder\.layer\.[01]\.(attention\.self\.(query|key|value)|(attention\.)?(output|intermediate)\.dense)$"
VIT = r"re:vit\.layers\.\d+\.(attention\.[qkvo]_proj|mlp\.fc[12])$"
ARMOR = {"block_size": 32, "propagate": "dense", "iterations": 20}


def fetched(name: str, target: str) -> Path:
    folder = MODELS / name
    if not (folder / "config.json").exists():
        pytest.skip(f"models/{name} was not fetched: `make {target}` does")
    return folder


def run(model: Path, output: Path, calibration: dict[str, Any], evaluation: dict[str, Any], **modifiers: Any) -> Result:
    recipe = {
        "model": str(model),
        "calibration": calibration,
        "prune_stage": {"row_modifiers": modifiers},
        "output": {"path": str(output)},
        "evaluation": evaluation,
    }
    return apply(recipe)


def figure(result: Result, measure: str, name: str) -> float:
    (found,) = [each.after for each in result.evaluations if each.name == measure]
    assert isinstance(found, Measurement)
    return found[name].value


def test_gemma3_predicts_text_and_needs_its_first_token() -> None:
    folder = fetched("gemma3-270m", "fetch-gemma3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    spec = {"dataset": "builtin:rustbook", "sequence_length": 256, "windows": 4}
    found = evaluate(model, PerplexitySpec(**spec), tokenizer)
    without = evaluate(model, PerplexitySpec(**spec, bos="never"), tokenizer)
    assert found.bos == (2,)
    assert found.value < 40 < without.value


def test_two_layers_of_gemma3_are_packed_and_read_again(tmp_path: Path) -> None:
    """A layer with a sliding window, and one that sees all."""
    folder = fetched("gemma3-270m", "fetch-gemma3")
    result = run(
        folder,
        tmp_path / "out",
        {"dataset": "builtin:jargon", "samples": 4, "sequence_length": 128},
        {"fidelity": {"dataset": "builtin:rustbook", "split": "train", "samples": 2, "sequence_length": 64}},
        ARMORModifier={"targets": [r"re:.*layers\.(4|5)\..*_proj$"], **ARMOR, "block_size": 64},
    )
    assert len(result.modules) == 14
    assert figure(result, "fidelity", "top1_agreement") > 0.7
    model: Any = load(result.output)
    asked = AutoTokenizer.from_pretrained(result.output)("The capital of France is", return_tensors="pt")
    assert model.generate(**asked, max_new_tokens=4, do_sample=False).shape == (1, 10)


def test_armor_and_refinement_keep_a_sentence_encoder_closer_than_plain_2_4(tmp_path: Path) -> None:
    folder = fetched("all-minilm-l6-v2", "fetch-minilm")
    rows = {
        "plain": {"NoWagModifier": {"targets": [BERT]}},
        "armor": {"ARMORModifier": {"targets": [BERT], **ARMOR}},
        "refined": {"ARMORModifier": {"targets": [BERT], **ARMOR}, "BlockRefineModifier": {"epochs": 4}},
    }
    calibration = {"dataset": "builtin:jargon", "samples": 24, "sequence_length": 64, "batch_size": 4}
    fidelity = {"dataset": "builtin:rustbook", "split": "train", "samples": 16, "sequence_length": 128}
    lost = {
        name: 1 - figure(run(folder, tmp_path / name, calibration, {"fidelity": fidelity}, **row), "fidelity", "cosine")
        for name, row in rows.items()
    }
    assert lost["refined"] < lost["armor"] < 0.6 * lost["plain"]


def test_armor_keeps_the_accuracy_of_a_vision_transformer(tmp_path: Path) -> None:
    folder = fetched("digits-vit", "train-vit")
    calibration = {"dataset": str(folder / "calibration.safetensors"), "samples": 256, "batch_size": 32}
    evaluation = {"classification": {"dataset": str(folder / "heldout.safetensors"), "batch_size": 64}}
    plain = run(folder, tmp_path / "plain", calibration, evaluation, NoWagModifier={"targets": [VIT]})
    (before,) = [each.before for each in plain.evaluations]
    assert isinstance(before, Measurement)
    armor = run(
        folder, tmp_path / "armor", calibration, evaluation, ARMORModifier={"targets": [VIT], **ARMOR, "block_size": 8}
    )
    dense = before["top1_accuracy"].value
    lost = [dense - figure(result, "classification", "top1_accuracy") for result in (plain, armor)]
    assert dense > 0.95
    assert lost[1] <= lost[0] / 2


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on the path")
def test_the_report_of_smollm2_in_a_browser(tmp_path: Path) -> None:
    """Every layer of it, by its own recipe made short; pictures lie beside the output, `--basetemp` keeps them."""
    fetched("smollm2-135m-instruct", "fetch-smollm2")
    recipe = Path(__file__).parents[2] / "recipes" / "smollm2-135m.yaml"
    armor = "prune_stage.armor_modifiers.ARMORModifier"
    short = (
        f"model.id={MODELS / 'smollm2-135m-instruct'}",
        f"{armor}.iterations=4",
        f"{armor}.calibration.samples=4",
        "calibration.samples=4",
        "evaluation.perplexity.windows=4",
        "evaluation.fidelity={dataset: builtin:pydoc-heldout, samples: 4, sequence_length: 512}",
    )
    output = apply(recipe, overrides=short, output=tmp_path / "out").output
    with browser(tmp_path / "profile") as tab:
        for width, dark in ((1280, False), (1280, True), (360, False), (360, True)):
            look(tab, output / "report.html", width=width, dark=dark, modules=210)
            tab.picture(tmp_path / f"{width}-{'dark' if dark else 'light'}.png")
