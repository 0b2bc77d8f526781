"""Every measure through a run: what is refused before it, and where its figures stand afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertModel, T5Config, T5ForConditionalGeneration

from armor_recipes import apply
from armor_recipes.errors import InputError, PlanError, RecipeError
from armor_recipes.evaluation import MEASURES, Measurement
from armor_recipes.evaluation.perplexity import PerplexityMeasure
from armor_recipes.events import EvaluationProgressed, Event, PhaseStarted
from armor_recipes.recipe import EvaluationSpec
from armor_recipes.run import evaluating
from tests.evaluation.test_classification import bert
from tests.evaluation.test_retrieval import WORDS
from tests.support.engine import make_model, recipe
from tests.support.tokenizers import byte_tokenizer

TINY: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
RANDOM = {"dataset": "builtin:random-tokens", "samples": 3, "sequence_length": 8}


def mapping(model: Path | str, folder: Path, **evaluation: Any) -> dict[str, Any]:
    targets = {"targets": [r"re:.*layers\.0\..*_proj$"]}
    return {**recipe(model, folder / "out", NoWagModifier=targets), "evaluation": evaluation}


def test_each_key_of_the_recipe_has_its_measure() -> None:
    assert [measure.name for measure in MEASURES] == [
        name for name in EvaluationSpec.model_fields if name not in ("max_perplexity_ratio", "max_kl_divergence")
    ]


def test_fidelity_of_a_run(llama: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    result = apply(mapping(llama, tmp_path, fidelity=RANDOM), observer=events.append)
    (found,) = result.evaluations
    assert (found.name, found.before) == ("fidelity", None)
    assert isinstance(found.after, Measurement)
    assert 0.5 < found.after["cosine"].value < 1
    assert (result.perplexity_before, result.perplexity_after) == (None, None)
    manifest = json.loads((result.output / "armor_manifest.json").read_text())
    assert manifest["evaluation"] == {
        "before": None,
        "after": None,
        "fidelity": {"before": None, "after": found.after.to_dict()},
    }
    assert (
        f"| cosine (3 samples (output logits, positions 24) of builtin:random-tokens) |  | {found.after['cosine'].text()} |"
        in (result.output / "README.md").read_text()
    )
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    phases = [event.name for event in events if isinstance(event, PhaseStarted)]
    assert [phase for phase in phases if phase.startswith("evaluate")] == ["evaluate before", "evaluate after"]
    progress = [event for event in events if isinstance(event, EvaluationProgressed)]
    assert progress[-1] == EvaluationProgressed(3, 3, "fidelity")


def test_equal_runs_give_equal_manifests(llama: Path, tmp_path: Path) -> None:
    manifests = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        output = apply(mapping(llama, tmp_path / name, fidelity=RANDOM)).output
        manifests.append((output / "armor_manifest.json").read_bytes())
    assert manifests[0] == manifests[1]


def test_several_measures_at_once(tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text(
        "\n".join(
            json.dumps({"query": f"the {word} module", "document": f"{word} module"}) for word in ("json", "os", "re")
        )
    )
    retrieval = {"dataset": str(tmp_path / "pairs.jsonl"), "pooling": "last", "sequence_length": 16}
    perplexity = {"dataset": "builtin:pydoc-heldout", "sequence_length": 16, "windows": 2}
    fidelity = {"dataset": "builtin:pydoc-heldout", "sequence_length": 16, "samples": 2}
    result = apply(
        mapping("builtin:stdlib-llama", tmp_path, retrieval=retrieval, fidelity=fidelity, perplexity=perplexity)
    )
    assert [found.name for found in result.evaluations] == ["perplexity", "fidelity", "retrieval"]
    assert result.perplexity_before is result.evaluations[0].before
    before, after = result.evaluations[2].before, result.evaluations[2].after
    assert isinstance(before, Measurement)
    assert isinstance(after, Measurement)
    assert before.sha256 == after.sha256
    manifest = json.loads((result.output / "armor_manifest.json").read_text())["evaluation"]
    assert [*manifest] == ["before", "after", "fidelity", "retrieval"]
    assert set(manifest["before"]) == {"perplexity", "nll", "tokens", "windows", "bos", "sha256"}
    assert str(tmp_path) not in json.dumps(manifest)
    assert str(tmp_path) not in (result.output / "README.md").read_text()


def test_multiple_choice_and_rolling_windows_of_a_run(tmp_path: Path) -> None:
    choice = {"dataset": "builtin:continuations", "samples": 12}
    perplexity = {"dataset": "builtin:pydoc-heldout", "documents": "rolling", "sequence_length": 64, "windows": 3}
    result = apply(mapping("builtin:stdlib-llama", tmp_path, multiple_choice=choice, perplexity=perplexity))
    rolling, chosen = result.evaluations  # of texts of 14 and 74 tokens
    assert (rolling.after.size, chosen.after.size) == (f"{14 + 64 + 10} tokens", "12 samples (choices 48)")
    assert [value.name for value in rolling.differences] == ["perplexity_ratio"]
    assert [value.name for value in chosen.differences] == ["accuracy_difference", "accuracy_by_bytes_difference"]
    manifest = json.loads((result.output / "armor_manifest.json").read_text())["evaluation"]
    assert set(manifest["after"]) == {"perplexity", "nll", "tokens", "windows", "bos", "sha256"}
    assert set(manifest["multiple_choice"]["after"]) == {
        *("samples", "choices", "texts_cut", "sha256"),
        *("accuracy", "accuracy_by_bytes"),
    }


def test_nothing_of_the_dense_model_stays_after_an_error(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        there = list(tmp_path.rglob("fidelity-*"))
        assert len(there) == 1
        raise ZeroDivisionError

    monkeypatch.setattr("armor_recipes.evaluation.fidelity.Fidelity.after", fail)
    with pytest.raises(ZeroDivisionError):
        apply(mapping(llama, tmp_path, fidelity=RANDOM))
    assert list(tmp_path.iterdir()) == []


def test_what_a_model_cannot_be_asked_is_told_with_the_plan(llama: Path, tmp_path: Path) -> None:
    labels = {"dataset": "missing.jsonl", "sequence_length": 8}
    with pytest.raises(PlanError, match=r"evaluation\.classification: LlamaForCausalLM has no classification head"):
        apply(mapping(llama, tmp_path, classification=labels, fidelity=RANDOM))
    long = {**RANDOM, "sequence_length": 4096}
    with pytest.raises(PlanError, match=r"evaluation\.fidelity: sequence_length 4096 is longer than the"):
        apply(mapping(llama, tmp_path, fidelity=long))


def test_data_that_cannot_be_read_and_rooms_that_are_too_small_are_told_before_weights_are_read(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("armor_recipes.run.job.load_model", None)
    with pytest.raises(InputError, match=r"no such file or folder: .*missing\.jsonl"):
        apply(mapping(llama, tmp_path, retrieval={"dataset": "./missing.jsonl", "sequence_length": 8}))
    huge = {**RANDOM, "samples": 10**9, "sequence_length": 2}
    monkeypatch.setattr("armor_recipes.run.data.build_inputs", lambda *_, **__: _Huge())
    with pytest.raises(Exception, match="the outputs of the dense model that evaluation compares with take"):
        apply(mapping(llama, tmp_path, fidelity=huge))


class _Huge:
    """Inputs that are said to be many."""

    origins = (0,)
    dataset = "a"

    @property
    def groups(self) -> list[dict[str, torch.Tensor]]:
        return [{"input_ids": torch.zeros(1, dtype=torch.int64).expand(10**12)}]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small BERT with seven classes and a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(folder)
    bert(classes=7).save_pretrained(folder)
    return folder


def encoder_recipe(model: Path, folder: Path, **evaluation: Any) -> dict[str, Any]:
    modifiers = {"NoWagModifier": {"targets": [r"re:.*layer\.0\..*(query|key|value|dense)$"]}}
    return {**recipe(model, folder / "out", **modifiers), "evaluation": evaluation}


def test_an_encoder_is_measured_by_all_but_perplexity(classifier: Path, tmp_path: Path) -> None:
    rows = [{"text": word, "label": place % 7, "query": word, "document": word * 2} for place, word in enumerate(WORDS)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"dataset": str(tmp_path / "rows.jsonl"), "sequence_length": 16}
    result = apply(encoder_recipe(classifier, tmp_path, fidelity=RANDOM, classification=data, retrieval=data))
    figures = {found.name: [value.name for value in found.after.values] for found in result.evaluations}
    assert figures == {
        "fidelity": ["cosine", "relative_difference", "top1_agreement", "kl_divergence", "kl_divergence_p99"],
        "classification": ["top1_accuracy", "top5_accuracy"],
        "retrieval": ["recall_at_1", "recall_at_10", "mean_reciprocal_rank"],
    }
    assert all(found.before is not None for found in result.evaluations[1:])
    text = {"dataset": "builtin:pydoc-heldout", "sequence_length": 8}
    with pytest.raises(
        PlanError, match=r"evaluation\.perplexity: BertForSequenceClassification predicts no next token"
    ):
        apply(encoder_recipe(classifier, tmp_path / "other", perplexity=text))


def test_who_has_no_perplexity() -> None:
    PerplexityMeasure.check(make_model())
    with torch.device("meta"):
        models = {
            "predicts no next token": [BertModel(BertConfig(**TINY)), BertForMaskedLM(BertConfig(**TINY))],
            "writes a target text for a source text": [
                T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
            ],
        }
    for reason, them in models.items():
        for model in them:
            with pytest.raises(PlanError, match=f"perplexity: {type(model).__name__} {reason}.*measure `fidelity`"):
                PerplexityMeasure.check(model)


@pytest.mark.parametrize("evaluation", [{}, {"fidelity": None}])
def test_an_evaluation_of_nothing(llama: Path, tmp_path: Path, evaluation: Any) -> None:
    with pytest.raises(
        RecipeError, match="evaluation: names nothing to measure; give one or more of perplexity, fidelity"
    ):
        apply(mapping(llama, tmp_path, **evaluation))


def test_no_folder_is_made_where_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(evaluating, "tried", None)
    perplexity = {"dataset": "builtin:pydoc-heldout", "sequence_length": 16, "windows": 1}
    assert apply(mapping("builtin:stdlib-llama", tmp_path, perplexity=perplexity)).perplexity_after is not None
