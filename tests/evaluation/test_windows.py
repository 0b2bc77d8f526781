"""Windows with a stride, rolling, and as the usual scripts cut them, each against the procedure written out here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from armor_recipes import builtin
from armor_recipes.errors import InputError
from armor_recipes.evaluation import Perplexity, evaluate, evaluation_windows
from armor_recipes.evaluation.presets import PRESETS
from armor_recipes.recipe.schema import PerplexitySpec
from tests.evaluation.test_special_tokens import bytes_with
from tests.support.tokenizers import byte_tokenizer

TEXT = "".join(chr(97 + place * place % 26) + " " * (place % 5 == 0) for place in range(150))


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(builtin.model_folder("stdlib-llama"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(builtin.model_folder("stdlib-llama"))


def begins() -> PreTrainedTokenizerBase:
    """The embedded model's tokenizer, with its end-of-text token before every text."""
    found = AutoTokenizer.from_pretrained(builtin.model_folder("stdlib-llama"))
    found.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", found.eos_token_id)]
    )
    return found


def rows(folder: Path, texts: Sequence[str]) -> str:
    file = folder / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return str(file)


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Of each id `(T,)` after the first, given those before it: `(T − 1,)`."""
    logits = model(ids[None, :-1]).logits[0].double()
    return logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]


@torch.no_grad()
def usual_script(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, length: int, most: int
) -> float:
    """Tokenise once, cut, and exp the mean over windows of their mean losses."""
    ids = tokenizer(text, return_tensors="pt").input_ids[:, : most * length]
    losses = []
    for start in range(0, ids.shape[1] - length + 1, length):
        window = ids[:, start : start + length]
        logits = model(window).logits
        loss = torch.nn.CrossEntropyLoss()(logits[0, :-1], window[0, 1:])
        losses.append(loss.float() * length)
    return math.exp(float(torch.stack(losses).sum()) / (len(losses) * length))


@pytest.mark.parametrize("with_bos", [False, True])
@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_presets_are_the_usual_scripts(
    name: str, with_bos: bool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer = begins() if with_bos else tokenizer
    texts = [row for text in builtin.documents("pydoc-heldout")[:8] for row in (*text.split("\n\n"), "")]
    length, most, separator = 128, 10**6, "\n\n"
    overrides: dict[str, Any] = {"dataset": rows(tmp_path, texts), "sequence_length": length}
    if name == "c4":
        most, separator, texts = 20, " ", texts[:90]
        overrides |= {"rows": 90, "windows": {"at_most": 20}}
    found = evaluate(model, PerplexitySpec(**{**PRESETS[name], **overrides}), tokenizer)
    expected = usual_script(model, tokenizer, separator.join(texts), length, most)
    assert found.value == pytest.approx(expected, rel=1e-4)
    assert found.bos == ()
    assert (found.windows == 20) == (name == "c4")
    if with_bos:
        each = evaluate(model, PerplexitySpec(**{**PRESETS[name], **overrides, "bos": "auto"}), tokenizer)
        assert abs(each.value / expected - 1) > 1e-3


def test_what_the_presets_say() -> None:
    assert {name: (keys["sequence_length"], keys["bos"], keys["separator"]) for name, keys in PRESETS.items()} == {
        "wikitext2": (2048, "once", "\n\n"),
        "c4": (2048, "once", " "),
    }
    assert (PRESETS["c4"]["rows"], PRESETS["c4"]["windows"]) == (1100, {"at_most": 256})


def rolled(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, length: int) -> float:
    """Every token of a text once, `length` at a time after the one before them; the last ones after as many as make `length`."""
    ids = torch.tensor([tokenizer.bos_token_id, *tokenizer(text).input_ids])
    total, done = 0.0, 0
    while done < len(ids) - 1:
        stop = min(done + length, len(ids) - 1)
        window = ids[max(0, stop - length) : stop + 1]
        total -= float(log_probabilities(model, window)[done - stop :].sum())
        done = stop
    return total


@pytest.mark.parametrize("with_bos", [False, True])
def test_rolling_is_as_lm_eval_does(
    with_bos: bool, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    tokenizer = begins() if with_bos else tokenizer
    texts = [*builtin.documents("pydoc-heldout")[1:6], " two  words ", "x"]
    spec = PerplexitySpec(dataset=rows(tmp_path, texts), documents="rolling", sequence_length=100)
    found = evaluate(model, spec, tokenizer)
    loss = sum(rolled(model, tokenizer, text, 100) for text in texts)
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    figures = {value.name: value.value for value in found.figures}
    assert found.tokens == sum(len(tokenizer(text).input_ids) for text in texts)
    assert figures["word_perplexity"] == pytest.approx(math.exp(loss / words), rel=1e-5)
    assert figures["byte_perplexity"] == pytest.approx(math.exp(loss / len("".join(texts).encode())), rel=1e-5)
    assert found.value == figures["perplexity"] == math.exp(found.nll)


@pytest.mark.parametrize("stride", [32, 100, 128])
def test_a_stride_predicts_every_token_once(
    stride: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    text = builtin.documents("pydoc-heldout")[3]
    (tmp_path / "a.txt").write_text(text)
    ids, done, losses = torch.tensor(tokenizer(text).input_ids), 0, []
    for start in range(0, len(ids), stride):
        stop = min(start + 128, len(ids))
        losses.append(-log_probabilities(model, ids[start:stop])[done - stop :])
        done = stop
        if stop == len(ids):
            break
    spec = PerplexitySpec(dataset=str(tmp_path / "a.txt"), sequence_length=128, stride=stride)
    found = evaluate(model, spec, tokenizer)
    predicted = torch.cat(losses)
    assert (found.tokens, found.windows) == (len(predicted), len(losses))
    assert found.tokens == len(ids) - (1 if stride < 128 else len(losses))
    assert found.nll == pytest.approx(float(predicted.mean()), rel=1e-5)


def test_windows_with_a_stride_begin_as_others_do(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    spec = PerplexitySpec(dataset=str(tmp_path / "a.txt"), sequence_length=17, stride=8)
    windows = evaluation_windows(spec, bytes_with("<s> $A"))
    assert set(windows.ids[:, 0].tolist()) == {256}
    assert windows.spans is not None
    assert windows.spans[:2].tolist() == [[1, 17], [9, 17]]
    assert sum(windows.targets) == len(TEXT.encode())
    first = evaluation_windows(spec.model_copy(update={"windows": 3}), bytes_with("<s> $A"))
    assert torch.equal(first.ids, windows.ids[:3])
    assert first.sha256 != windows.sha256


def test_the_text_once_begins_and_ends_as_the_tokenizer_writes_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abcdefgh")
    spec = PerplexitySpec(dataset=str(tmp_path / "a.txt"), sequence_length=5, bos="once")
    windows = evaluation_windows(spec, bytes_with("<s> $A </s>"))
    assert windows.ids.flatten().tolist() == bytes_with("<s> $A </s>")("abcdefgh").input_ids
    assert windows.prefix == ()


def test_words_and_bytes_are_counted_as_lm_eval_does(tmp_path: Path) -> None:
    text = " zwei  Wörter\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    spec = PerplexitySpec(dataset=str(tmp_path / "a.txt"), sequence_length=4, bos="never")
    windows = evaluation_windows(spec, bytes_with("$A"))
    assert windows.tokens_per == (len(text.encode()) / 4, 1.0)


def test_what_no_float_holds_is_left_out() -> None:
    found = Perplexity(math.exp(8), 8.0, 4, 2, "d", "", (), (16.0, 16.0), (2, 2), 100.0, 1.0)
    assert [value.name for value in found.figures] == ["perplexity", "byte_perplexity"]
    assert found.figures[0].interval == (pytest.approx(math.exp(8)), pytest.approx(math.exp(8)))


def test_one_window_has_no_interval() -> None:
    found = Perplexity(math.exp(8), 8.0, 2, 1, "d", "", (), (16.0,), (2,), 2.0, 1.0)
    assert [value.interval for value in found.figures] == [None, None, None]
    assert [value.interval for value in found.against(found)] == [None]


def test_paired_windows_have_a_narrow_ratio() -> None:
    dense = Perplexity(1.0, 0.0, 40, 4, "d", "a", (), (10.0, 20.0, 30.0, 40.0), (10, 10, 10, 10))
    other = Perplexity(2.0, 0.0, 40, 4, "d", "a", (), (11.0, 21.0, 31.0, 41.0), (10, 10, 10, 10))
    (ratio,) = other.against(dense)
    assert (ratio.name, ratio.value) == ("perplexity_ratio", 2.0)
    assert ratio.interval == (pytest.approx(math.exp(0.1)), pytest.approx(math.exp(0.1)))
    assert other.against(Perplexity(1.0, 0.0, 40, 4, "d", "b", (), (1.0,), (10,))) == ()


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sequence_length": 8, "stride": 9}, r"`stride` 9 leaves out text between windows that hold 8 tokens of it"),
        ({"sequence_length": 8, "stride": 4, "windows": 1000}, r"has \d+ windows of 8 tokens .*1000 are needed"),
        ({"documents": "rolling"}, r"no token for the beginning of a text and none for its end"),
    ],
)
def test_what_cannot_be_cut(keys: dict[str, Any], said: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    with pytest.raises(InputError, match=said):
        evaluation_windows(PerplexitySpec(dataset=str(tmp_path / "a.txt"), **keys), byte_tokenizer(end=False))


@pytest.mark.parametrize("keys", [{"stride": 4}, {"bos": "once"}])
def test_rolling_has_windows_of_its_own(keys: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="`documents: rolling` has windows of its own"):
        PerplexitySpec(dataset="d", documents="rolling", **keys)
