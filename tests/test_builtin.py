"""The embedded model and its texts are what NOTICE.md says they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from armor_recipes import builtin
from armor_recipes.errors import InputError

FOLDER = builtin.model_folder("stdlib-llama")
VOCABULARY = 2048
LENGTH = 512


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32)
    return loaded


def test_files_are_small_enough_for_a_package() -> None:
    assert (FOLDER / "model.safetensors").stat().st_size <= 12_000_000
    texts = [path for kind in ("*.bin", "*.xz") for path in FOLDER.parent.glob(kind)]
    assert len(texts) == len(builtin.texts())
    assert sum(path.stat().st_size for path in texts) <= 1_100_000


def test_the_jargon_file_is_prose_of_its_own_kind() -> None:
    documents = builtin.documents("jargon")
    assert len(documents) == 6
    assert sum(map(len, documents)) == 699_942 - 5
    assert documents[0].startswith("Appendix A. Hacker Folklore")
    assert not any(mark in text for text in documents for mark in "{}│\f")
    assert builtin.text("jargon") == "\n\n".join(documents)
    with pytest.raises(InputError, match="no embedded text of token ids 'jargon'"):
        builtin.token_ids("jargon")


@pytest.mark.parametrize(
    ("name", "count", "characters", "begins"),
    [("speeches", 21, 699_970, "Thank you. (Applause.)"), ("rustbook", 87, 699_948, "Note: This edition of the book")],
)
def test_other_prose(name: str, count: int, characters: int, begins: str) -> None:
    documents = builtin.documents(name)
    assert len(documents) == count
    assert sum(map(len, documents)) == characters - (count - 1)
    assert documents[0].startswith(begins)
    assert not any(mark in text for text in documents for mark in ("\f", "  ", "&lt;"))


def test_weights_are_bfloat16_and_embeddings_tied() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    with safe_open(FOLDER / "model.safetensors", "pt") as stored:
        names = list(stored.keys())
        assert {stored.get_slice(name).get_dtype() for name in names} == {"BF16"}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


def test_every_linear_side_is_divisible_by_128(model: PreTrainedModel) -> None:
    sides = {side for m in model.modules() if isinstance(m, torch.nn.Linear) for side in m.weight.shape}
    assert sides
    assert all(side % 128 == 0 for side in sides)


def test_parameter_count(model: PreTrainedModel) -> None:
    assert 3_000_000 <= sum(p.numel() for p in model.parameters()) <= 6_000_000


def test_generation_ends_at_the_end_of_text(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    assert (FOLDER / "generation_config.json").exists()
    assert tokenizer.eos_token == "<|endoftext|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
@example(" leading,  double  spaces , and don't clean up .\r\n\t")
@example("é 😀 \u200d\x00 ﬁ Å <|endoftext|>")
def test_tokenizer_gives_back_any_text(tokenizer: PreTrainedTokenizerBase, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("name", "least", "most"), [("pydoc", 100_000, 200_000), ("pydoc-heldout", 40_000, 80_000)])
def test_token_ids_decode_to_the_documents(
    tokenizer: PreTrainedTokenizerBase, name: str, least: int, most: int
) -> None:
    ids = builtin.token_ids(name)
    assert ids.dtype == np.uint16
    assert ids.max() < VOCABULARY
    assert least <= len(ids) <= most
    again = [[*tokenizer.encode(text, verbose=False), tokenizer.eos_token_id] for text in builtin.documents(name)]
    assert [i for document in again for i in document] == ids.tolist()
    assert builtin.text(name) == "\n\n".join(builtin.documents(name))
    assert "<|endoftext|>" not in builtin.text(name)


def shingles(text: str, *, words: int = 12) -> set[tuple[str, ...]]:
    split = text.lower().split()
    return {tuple(split[i : i + words]) for i in range(len(split) - words + 1)}


def test_heldout_text_is_not_in_the_calibration_text() -> None:
    calibration, heldout = builtin.documents("pydoc"), builtin.documents("pydoc-heldout")
    assert not set(calibration) & set(heldout)
    seen, asked = shingles("\n".join(calibration)), shingles("\n".join(heldout))
    assert len(asked & seen) < 0.02 * len(asked)


def bigram_loss(train: np.ndarray, evaluated: np.ndarray, weight: float) -> float:
    """Mean -log p of each row's tokens but the first: weight * c(v,w)/c(v) + (1-weight) * (c(w)+1)/(T+V)."""
    pairs = np.bincount(train[:-1] * VOCABULARY + train[1:], minlength=VOCABULARY**2).reshape(VOCABULARY, VOCABULARY)
    single = (np.bincount(train, minlength=VOCABULARY) + 1) / (len(train) + VOCABULARY)
    before, after = evaluated[:, :-1], evaluated[:, 1:]
    conditional = pairs[before, after] / np.maximum(pairs.sum(1), 1)[before]
    return float(-np.log(weight * conditional + (1 - weight) * single[after]).mean())


def test_heldout_perplexity_is_below_half_of_a_bigram_model(model: PreTrainedModel) -> None:
    heldout = builtin.token_ids("pydoc-heldout").astype(np.int64)
    rows = heldout[: 12 * LENGTH].reshape(-1, LENGTH)
    train = builtin.token_ids("pydoc").astype(np.int64)
    bigram = min(bigram_loss(train, rows, weight / 20) for weight in range(1, 20))
    batch = torch.from_numpy(rows)
    with torch.no_grad():
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss.item()
    assert math.exp(loss) < 0.4 * math.exp(bigram)


@pytest.mark.parametrize("name", ["", "Pydoc", "../errors", "builtin:pydoc", "stdlib-llama"])
@pytest.mark.parametrize("read", [builtin.text, builtin.documents, builtin.token_ids])
def test_unknown_text_names_the_known_ones(read: Callable[[str], object], name: str) -> None:
    with pytest.raises(InputError, match=r"builtin:pydoc, builtin:pydoc-heldout"):
        read(name)


def test_unknown_model_names_the_known_one() -> None:
    with pytest.raises(InputError, match=r"'gpt-5'; known: builtin:stdlib-llama"):
        builtin.model_folder("gpt-5")
