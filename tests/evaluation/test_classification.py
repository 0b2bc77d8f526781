from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification

from armor_recipes.calibration.inputs import InputSet, ModelInputs
from armor_recipes.errors import InputError, NumericalError, PlanError
from armor_recipes.evaluation import Reading, Room
from armor_recipes.evaluation.classification import Classification, ranks_of
from armor_recipes.evaluation.intervals import wilson
from armor_recipes.recipe.schema import ClassificationSpec, InputsSpec
from tests.support.engine import make_model
from tests.support.tokenizers import byte_tokenizer

MODEL = ModelInputs("Bert", 300, ("input_ids", "x"))
LABELS = {f"class {number}": number for number in range(7)}


def no_inputs(spec: InputsSpec) -> InputSet:
    raise AssertionError(spec)


def reading(*, pad: bool = True) -> Reading:
    tokenizer = byte_tokenizer()
    if pad:
        tokenizer.pad_token = tokenizer.eos_token
    return Reading(tokenizer, MODEL, no_inputs, LABELS)


def rows(folder: Path, *found: Any, name: str = "a.jsonl") -> Path:
    (folder / name).write_text("\n".join(json.dumps(row) for row in found))
    return folder / name


def read(path: Path, read_with: Reading | None = None, **keys: Any) -> Classification:
    return Classification.read(ClassificationSpec(dataset=str(path), **keys), read_with or reading())


def bert(classes: int = 7) -> BertForSequenceClassification:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return BertForSequenceClassification(BertConfig(vocab_size=300, num_labels=classes, **sizes))


TEXTS = ["a", "bc", "d", "efg", "hi", "j", "longer than that"]


def test_accuracy_of_texts(tmp_path: Path) -> None:
    """Against the model asked text by text; a label may be a number or the name of a class."""
    model = bert().eval()
    tokenizer = byte_tokenizer()
    with torch.no_grad():
        logits = [model(**tokenizer(text, return_tensors="pt")).logits[0] for text in TEXTS]
    best = [row.argsort(descending=True) for row in logits]
    labels: list[Any] = [
        int(best[0][0]),
        f"class {int(best[1][0])}",
        *(int(row[place]) for row, place in zip(best[2:], (1, 4, 5, 0, 6), strict=True)),
    ]
    path = rows(tmp_path, *({"text": t, "label": label} for t, label in zip(TEXTS, labels, strict=True)))
    seen: list[tuple[int, int]] = []
    measure = read(path)
    found = measure.before(model.train(), Room(tmp_path, lambda done, total: seen.append((done, total))))
    assert model.training
    assert seen[-1] == (7, 7)
    assert found is not None
    assert [(v.name, v.value, v.interval) for v in found.values] == [
        ("top1_accuracy", 3 / 7, wilson(3, 7)),
        ("top5_accuracy", 5 / 7, wilson(5, 7)),
    ]
    assert found.size == "7 samples (classes 7)"
    assert found == measure.after(model, Room(tmp_path))
    assert read(path, batch_size=1).after(model, Room(tmp_path)).values == found.values


def test_long_texts_are_cut_and_counted_and_samples_come_from_the_start(tmp_path: Path) -> None:
    path = rows(tmp_path, *({"body": text, "kind": 0} for text in TEXTS))
    measure = read(path, text_column="body", label_column="kind", sequence_length=3)
    assert (len(measure.samples), measure.cut) == (7, 1)
    assert "texts cut 1" in measure.after(bert(), Room(tmp_path)).size
    assert len(read(path, text_column="body", label_column="kind", samples=2).samples) == 2
    assert measure.samples.hash() != read(path, text_column="body", label_column="kind").samples.hash()


@given(st.lists(st.lists(st.integers(-3, 3), min_size=4, max_size=4), min_size=1, max_size=6))
def test_ranks_are_places_in_the_order_of_logits(values: list[list[int]]) -> None:
    logits = torch.tensor(values).float()
    for label in range(4):
        found = ranks_of(logits, torch.full((len(values),), label)).tolist()
        assert found == [sum(other >= row[label] for other in row) for row in values]


def test_a_tie_is_no_hit() -> None:
    assert ranks_of(torch.zeros(1, 3), torch.tensor([0])).tolist() == [3]


def test_models_are_compared_sample_by_sample(tmp_path: Path) -> None:
    data = read(rows(tmp_path, *({"text": word, "label": n % 2} for n, word in enumerate(("a", "bb", "ccc", "dd")))))
    found, few = (data.after(bert(classes), Room(tmp_path)) for classes in (7, 2))
    assert [value.value for value in found.against(found)] == [0.0, 0.0]
    (difference,) = few.against(found)  # few classes have no top 5
    assert difference.name == "top1_accuracy_difference"
    assert difference.value == few["top1_accuracy"].value - found["top1_accuracy"].value


def test_few_classes_have_no_top_5(tmp_path: Path) -> None:
    path = rows(tmp_path, {"text": "a", "label": 1}, {"text": "b", "label": 0})
    found = read(path).after(bert(2), Room(tmp_path))
    assert [value.name for value in found.values] == ["top1_accuracy"]


def test_tensors_with_labels(tmp_path: Path) -> None:
    ids = torch.randint(300, (5, 4), generator=torch.Generator().manual_seed(0))
    model = bert().eval()
    with torch.no_grad():
        labels = model(input_ids=ids).logits.argmax(-1)
    save_file({"input_ids": ids, "labels": labels}, tmp_path / "a.safetensors")
    measure = read(tmp_path / "a.safetensors", batch_size=2)
    found = measure.after(model, Room(tmp_path))
    assert (found["top1_accuracy"].value, found.samples, found.details) == (1.0, 5, {"classes": 7})
    assert len(read(tmp_path / "a.safetensors", samples=3).samples) == 3


@pytest.mark.parametrize(
    ("tensors", "keys", "said"),
    [
        ({"x": torch.ones(2, 3)}, {}, "has no tensor 'labels'; set `label_column` to one of: x"),
        ({"x": torch.ones(2, 3), "labels": torch.ones(2)}, {}, "a whole number for each sample"),
        ({"x": torch.ones(2, 3), "labels": torch.ones(3).long()}, {}, "different numbers of samples"),
        (
            {"y": torch.ones(2, 3), "labels": torch.ones(2).long()},
            {},
            "tensor 'y', which the forward pass of Bert does not",
        ),
        ({"input_ids": torch.tensor([[300]]), "labels": torch.tensor([0])}, {}, "holds the id 300"),
        ({"labels": torch.ones(3).long()}, {}, "a whole number for each sample"),
        ({"x": torch.ones(2, 3), "labels": torch.tensor([0, 7])}, {}, "labels holds 0 to 7; the classes are 0 to 6"),
        ({"x": torch.ones(2, 3), "labels": torch.tensor([0, 6])}, {"samples": 3}, "2 samples, but 3 are asked for"),
    ],
)
def test_tensors_that_will_not_do(tmp_path: Path, tensors: Any, keys: dict[str, Any], said: str) -> None:
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=said):
        read(tmp_path / "a.safetensors", **keys)


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("no")
    for name, said in (("a", "cannot read .*a.safetensors as"), ("b", "no such file or folder: .*b.safetensors")):
        with pytest.raises(InputError, match=said):
            read(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize(
    ("row", "keys", "said"),
    [
        (
            {"text": "a", "label": "klass 3"},
            {},
            ":1: `label_column` holds 'klass 3', no class of the model; nearest labels: class",
        ),
        ({"text": "a", "label": 7}, {}, "holds 7; the model's classes are 0 to 6"),
        ({"text": "a", "label": -1}, {}, "holds -1"),
        ({"text": "a", "label": 1.0}, {}, "holds 1.0, neither a class's number nor its name"),
        ({"text": "a", "label": True}, {}, "holds True, neither"),
        ({"text": "a"}, {}, "no column 'label'; set `label_column`"),
        ({"text": None, "label": 0}, {}, "`text_column` holds None, not text"),
        ({"text": " ", "label": 0}, {}, "holds an empty text"),
        ({"text": "a", "label": 0}, {"samples": 2}, "has 1 rows, but 2 are asked for"),
    ],
)
def test_rows_that_will_not_do(tmp_path: Path, row: Any, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(rows(tmp_path, row), **keys)


def test_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        read(rows(tmp_path, {"text": "a", "label": 0}), Reading(None, MODEL, no_inputs, LABELS))


def test_a_classifier_without_a_padding_token_reads_one_text_at_a_time(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_labels=7,
    )
    with torch.random.fork_rng():
        model = LlamaForSequenceClassification(config)
    measure = read(rows(tmp_path, *({"text": text, "label": 0} for text in TEXTS)), reading(pad=False))
    assert measure.after(model, Room(tmp_path)).samples == 7


def test_logits_that_are_not_finite(tmp_path: Path) -> None:
    model = bert()
    model.classifier.weight.data.fill_(float("nan"))
    with pytest.raises(NumericalError, match="not finite"):
        read(rows(tmp_path, {"text": "a", "label": 0})).after(model, Room(tmp_path))


def test_models_without_classes_are_refused() -> None:
    Classification.check(bert())
    with pytest.raises(PlanError, match=r"evaluation.classification: LlamaForCausalLM has no classification head"):
        Classification.check(make_model())
