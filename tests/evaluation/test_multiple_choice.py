"""Multiple choice: figures by hand, tokens as lm-eval splits them, and what is no question."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerBase

from armor_recipes import builtin
from armor_recipes.builtin.continuations import questions
from armor_recipes.calibration.inputs import TOKENS, ModelInputs
from armor_recipes.errors import InputError, NumericalError, PlanError
from armor_recipes.evaluation import Evaluation, Reading, Room
from armor_recipes.evaluation.multiple_choice import MultipleChoice
from armor_recipes.evaluation.records import from_record, to_record
from armor_recipes.recipe.schema import MultipleChoiceSpec
from tests.evaluation.test_special_tokens import bytes_with
from tests.support.tokenizers import byte_tokenizer


class Letters(nn.Module):
    """After any token, ids have fixed log-probabilities: those of letters that are told, and of all others the same."""

    def __init__(self, **likely: float) -> None:
        super().__init__()
        logits = torch.zeros(258)
        for letter, value in likely.items():
            logits[ids(letter)[0]] = value
        self.logits = nn.Parameter(logits)

    def forward(self, *, input_ids: Tensor, return_dict: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def ids(text: str) -> list[int]:
    found: list[int] = bytes_with("$A")(text).input_ids
    return found


def read(
    rows: list[dict[str, Any]], folder: Path, tokenizer: PreTrainedTokenizerBase | None = None, **keys: Any
) -> MultipleChoice:
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    reading = Reading(tokenizer or bytes_with("<s> $A"), ModelInputs(vocab_size=258), None)  # type: ignore[arg-type]
    return MultipleChoice.read(MultipleChoiceSpec(dataset=str(folder / "rows.jsonl"), **keys), reading)


def row(context: str, choices: list[str], answer: int = 0) -> dict[str, Any]:
    return {"context": context, "choices": choices, "answer": answer}


def test_answers_are_hashed_with_the_texts(tmp_path: Path) -> None:
    right, wrong = (read([row("is", ["a", "b"], answer)], tmp_path) for answer in (0, 1))
    shifted = read([row("i", ["sa", "sb"], 0)], tmp_path)  # the same texts, of which the choices are longer
    assert right.texts.hash() == wrong.texts.hash() == shifted.texts.hash()
    assert len({right.sha256, wrong.sha256, shifted.sha256}) == 3


ROWS = [
    row("is", ["a", "bb"], 0),  # a by its sum, and by its bytes
    row("is", ["bb", "c"], 0),  # two likely letters are less likely than one, and more by bytes
    row("is", ["aaa", "b"], 1),
    row("is", ["a", "a"], 0),  # equals are no hit
]


def test_accuracy_by_hand(tmp_path: Path) -> None:
    model = Letters(a=3.0, b=2.0, c=0.5)
    seen: list[tuple[int, int]] = []
    measure = read(ROWS, tmp_path, batch_size=3)
    found = measure.after(model, Room(tmp_path, lambda *done: seen.append(done)))
    norm = math.log(255 + math.exp(3) + math.exp(2) + math.exp(0.5))
    sums = {"a": 3 - norm, "bb": 4 - 2 * norm, "c": 0.5 - norm, "aaa": 9 - 3 * norm, "b": 2 - norm}
    assert sums["a"] > sums["bb"]
    assert sums["bb"] < sums["c"]
    assert sums["bb"] / 2 > sums["c"]
    assert sums["b"] > sums["aaa"]
    assert sums["b"] < sums["aaa"] / 3
    assert found.rows == {"accuracy": (1.0, 0.0, 1.0, 0.0), "accuracy_by_bytes": (1.0, 1.0, 0.0, 0.0)}
    assert (found["accuracy"].value, found["accuracy_by_bytes"].value) == (0.5, 0.5)
    assert found["accuracy"].interval == pytest.approx((0.1500, 0.8500), abs=1e-4)
    assert (found.samples, found.details) == (4, {"choices": 8, "texts_cut": 0, "answers_that_stand_twice": 1})
    assert seen[-1] == (8, 8)
    scores = measure._scores(model, Room(tmp_path))
    assert scores[:2].tolist() == pytest.approx([sums["a"], sums["bb"]], rel=1e-6)
    assert from_record(json.loads(json.dumps(to_record(found)))) == found
    assert "rows" not in found.to_dict()


def test_differences_are_of_paired_questions(tmp_path: Path) -> None:
    measure = read(ROWS, tmp_path)
    dense, other = (measure.after(Letters(a=high, b=2.0, c=0.5), Room(tmp_path)) for high in (3.0, 1.0))
    found = {value.name: value for value in Evaluation("multiple_choice", dense, other).differences}
    pairs = [after - before for before, after in zip(dense.rows["accuracy"], other.rows["accuracy"], strict=True)]
    assert found["accuracy_difference"].value == sum(pairs) / 4
    assert Evaluation("multiple_choice", dense, dense).differences[0].interval == (0.0, 0.0)
    assert Evaluation("multiple_choice", None, other).differences == ()


def test_a_space_at_the_end_of_a_context_belongs_to_the_choice(tmp_path: Path) -> None:
    measure = read([row("is ", ["a", "bb"])], tmp_path)
    assert [text[TOKENS] for text in measure.texts.rows] == [[256, *ids("is a")], [256, *ids("is bb")]]
    assert measure.ends == (2, 3)


def test_a_long_context_loses_its_start(tmp_path: Path) -> None:
    measure = read([row("abcdef", ["g", "hi"])], tmp_path, sequence_length=6)
    assert [text[TOKENS] for text in measure.texts.rows] == [[256, *ids("cdefg")], [256, *ids("defhi")]]
    assert measure.texts.cut == 2


def test_without_a_context_a_text_begins(tmp_path: Path) -> None:
    measure = read([row("", ["a", "b"])], tmp_path, bytes_with("$A"))
    assert [text[TOKENS] for text in measure.texts.rows] == [[256, *ids("a")], [256, *ids("b")]]
    with pytest.raises(InputError, match="the context is empty, and the tokenizer has no token before a text"):
        read([row("", ["a", "b"])], tmp_path, byte_tokenizer(end=False))


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (row("a", ["b"]), r"rows\.jsonl:1: the choices are \['b'\], not two texts or more"),
        (row("a", ["b", "\ud800"]), r"rows\.jsonl:1: character 0 is a lone surrogate"),
        (row("a\ud800", ["b", "c"]), r"rows\.jsonl:1: character 1 is a lone surrogate"),
        (row("a", ["b", ""]), "not two texts or more"),
        (row("a", ["b", "c"], 2), "the answer is 2, not the number of one of 2 choices, from 0"),
        ({**row("a", ["b", "c"]), "answer": True}, "the answer is True"),
        ({**row("a", ["b", "c"]), "context": 7}, "the context is 7, not text"),
        (row("a", ["b", "c" * 9]), "a choice has 9 tokens, and may have 7 with `sequence_length` 8"),
        ({"context": "a", "choices": ["b", "c"]}, "no column 'answer'; set `answer_column` to one of its columns"),
    ],
)
def test_what_is_no_question(wrong: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        read([wrong], tmp_path, sequence_length=8)


def test_a_choice_that_becomes_one_token_with_its_context(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(builtin.model_folder("stdlib-llama"))
    assert [len(tokenizer(text)["input_ids"]) for text in ("d", "def")] == [1, 1]
    with pytest.raises(InputError, match=r"rows\.jsonl:1: the tokenizer makes no token of a choice behind its context"):
        read([row("d", ["ef", " x"])], tmp_path, tokenizer)


def test_likelihoods_that_are_not_finite(tmp_path: Path) -> None:
    with pytest.raises(NumericalError, match="the log-likelihood of a choice is not finite"):
        read(ROWS, tmp_path).after(Letters(a=float("inf")), Room(tmp_path))


def test_who_has_no_likelihood() -> None:
    config = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(PlanError, match=r"evaluation\.multiple_choice: BertModel predicts no next token"):
        MultipleChoice.check(BertModel(config))


def test_a_thousand_continuations_are_the_same_each_time() -> None:
    found = builtin.continuations()
    assert len(found) == 1000
    assert found == builtin.continuations()
    text = "\f".join(builtin.documents("pydoc-heldout"))
    places = []
    for question in found:
        context, choices, answer = question["context"], question["choices"], question["answer"]
        assert isinstance(context, str)
        assert isinstance(choices, list)
        assert isinstance(answer, int)
        assert len(set(choices)) == 4
        assert (
            len({len(choice.encode()) for choice in choices}) == len({len(choice.split()) for choice in choices}) == 1
        )
        assert context + choices[answer] in text
        assert all(choice in text for choice in choices)
        places.append(answer)
    assert all(200 < places.count(place) < 300 for place in range(4))


def test_a_text_that_is_too_short_for_questions() -> None:
    with pytest.raises(InputError, match="the text has passages for 0 questions, and 1 are asked for"):
        questions(["a few words only"], 1)
