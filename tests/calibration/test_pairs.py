"""Rows of a source and a target for an encoder and a decoder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from armor_recipes.calibration.inputs import InputSet, ModelInputs
from armor_recipes.calibration.tokens import build_inputs
from armor_recipes.errors import InputError
from armor_recipes.recipe.schema import AtMost, CalibrationSpec, WeightedDataset
from tests.support.tokenizers import byte_tokenizer

ARGUMENTS = ("input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask")
MODEL = ModelInputs("TinyT5", 300, ARGUMENTS, encoder_decoder=True, decoder_start=290, padding=256)
ROWS = [{"from": "ab", "to": "xyz"}, {"from": "  ", "to": "x"}, {"from": "cdefg", "to": "y"}, {"from": "h", "to": None}]
END, PAD = 256, 257


@pytest.fixture
def padded() -> PreTrainedTokenizerFast:
    """A tokenizer of bytes that ends every text, as T5's does, and pads."""
    made = byte_tokenizer()
    made.add_special_tokens({"pad_token": "<pad>"})
    made.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <end>", special_tokens=[("<end>", made.eos_token_id)]
    )
    assert (made.eos_token_id, made.pad_token_id) == (END, PAD)
    return made


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def build(dataset: Any, tokenizer: Any, model: ModelInputs = MODEL, **keys: Any) -> InputSet:
    made = {"source_column": "from", "target_column": "to", "sequence_length": 5, **keys}
    return build_inputs(
        CalibrationSpec(dataset=str(dataset) if isinstance(dataset, Path) else dataset, **made),
        model,
        tokenizer=tokenizer,
    )


def test_sources_are_padded_and_targets_shifted(rows: Path, padded: PreTrainedTokenizerFast) -> None:
    found = build(rows, padded, samples=2)
    ids = {letter: padded.convert_tokens_to_ids(letter) for letter in "abcdefgxyz"}
    order = [int(row[0] == ids["c"]) for row in found.ids.tolist()]
    rows_of = {name: [tensor.tolist()[i] for i in map(order.index, (0, 1))] for name, tensor in found.tensors.items()}
    assert rows_of["input_ids"] == [[ids["a"], ids["b"], END, PAD, PAD], [*(ids[each] for each in "cdef"), END]]
    assert rows_of["attention_mask"] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert rows_of["decoder_input_ids"] == [[290, ids["x"], ids["y"], ids["z"], END], [290, ids["y"], END, PAD, PAD]]
    assert rows_of["decoder_attention_mask"] == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    (source,) = found.sources
    assert (source.documents, source.empty, source.cut, source.tokens) == (2, 2, 1, 8)


def test_parquet_gives_the_same_rows(rows: Path, padded: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "rows.parquet")
    assert build(tmp_path / "rows.parquet", padded, samples=2).sha256 == build(rows, padded, samples=2).sha256


def test_a_stream_draws_rows_by_the_seed(padded: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "many.jsonl"
    path.write_text("".join(json.dumps({"from": f"{i:03}", "to": "x"}) + "\n" for i in range(300)))
    found, fewer = (build(path, padded, samples=count, stream=True, seed=3) for count in (20, 7))
    assert torch.equal(found.ids[:7], fewer.ids)
    assert len({tuple(row) for row in found.ids.tolist()}) == 20
    assert found.sources[0].stream
    assert found.sources[0].available is None
    assert build(path, padded, samples=20, stream=True, seed=4).sha256 != found.sha256


def test_a_mix_of_pairs_names_columns_of_its_own(rows: Path, padded: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps({"de": "q", "en": "r"}) + "\n")
    mix = (
        WeightedDataset(dataset=str(rows), weight=2),
        WeightedDataset(dataset=str(other), weight=1, source_column="de", target_column="en"),
    )
    found = build(mix, padded, samples=AtMost(at_most=30))
    assert (len(found), [source.taken for source in found.sources]) == (3, [2, 1])


@pytest.mark.parametrize(
    ("keys", "model", "message"),
    [
        ({"target_column": None}, MODEL, "`source_column` needs a `target_column`"),
        ({"source_column": "nothing"}, MODEL, r"rows.jsonl:1 has no column 'nothing'; set `source_column`.*from, to"),
        ({"image_column": "from"}, MODEL, "`image_column` and `source_column` do not go together"),
        ({}, ModelInputs("TinyLlama", 300, ARGUMENTS), "TinyLlama is no encoder and decoder"),
        ({}, ModelInputs("TinyT5", 300, ARGUMENTS, encoder_decoder=True), "names no decoder_start_token_id"),
        (
            {},
            ModelInputs("TinyT5", 200, ARGUMENTS, encoder_decoder=True, decoder_start=0),
            "id 257, but the model embeds 200",
        ),
        ({"source_column": None, "target_column": None}, MODEL, "has an encoder and a decoder.*`source_column` and"),
    ],
)
def test_what_does_not_go_together_is_told(
    rows: Path, padded: PreTrainedTokenizerFast, keys: dict[str, Any], model: ModelInputs, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        build(rows, padded, model, samples=2, **keys)


def test_rows_and_tokenizers_that_cannot_be_used_are_told(rows: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the model has no tokenizer"):
        build(rows, None, samples=1)
    with pytest.raises(InputError, match="the tokenizer has no padding token"):
        build(rows, byte_tokenizer(), samples=1)
    with pytest.raises(InputError, match="is plain text and has no `source_column` and `target_column`"):
        build("builtin:pydoc", byte_tokenizer(), samples=1)
    (tmp_path / "bad.jsonl").write_text('{"from": 3, "to": "x"}\n')
    with pytest.raises(
        InputError, match=r"bad.jsonl:1: the source column holds 3, not text; name another `source_column`"
    ):
        build(tmp_path / "bad.jsonl", byte_tokenizer(), samples=1)
    (tmp_path / "none.jsonl").write_text('{"from": "", "to": "x"}\n')
    with pytest.raises(InputError, match="has no row that can be used: 1 lack a part"):
        build(tmp_path / "none.jsonl", byte_tokenizer(), samples=1)


def test_windows_of_an_encoder_end_as_the_tokenizer_ends_texts(tmp_path: Path) -> None:
    made = byte_tokenizer(end=False)
    made.add_special_tokens({"cls_token": "<cls>", "sep_token": "<sep>"})
    ends = [("<cls>", made.cls_token_id), ("<sep>", made.sep_token_id)]
    made.backend_tokenizer.post_processor = TemplateProcessing(single="<cls> $A <sep>", special_tokens=ends)
    (tmp_path / "a.txt").write_text("abcdefgh")
    spec = CalibrationSpec(dataset=str(tmp_path / "a.txt"), samples=2, sequence_length=5)
    found = build_inputs(spec, ModelInputs("TinyBert", 300, closes=True), tokenizer=made)
    assert (found.prefix, found.suffix) == ((ends[0][1],), (ends[1][1],))
    assert sorted(made.decode(row) for row in found.ids) == ["<cls>abc<sep>", "<cls>def<sep>"]
    open_ended = build_inputs(spec, ModelInputs("TinyLlama", 300), tokenizer=made)
    assert open_ended.suffix == ()
    assert sorted(made.decode(row) for row in open_ended.ids) == ["<cls>abcd", "<cls>efgh"]
    short = spec.model_copy(update={"sequence_length": 2})
    with pytest.raises(InputError, match=r"after the ids \[256\] and \[257\] that the tokenizer puts around it"):
        build_inputs(short, ModelInputs("TinyBert", 300, closes=True), tokenizer=made)
    drawn = spec.model_copy(update={"dataset": "builtin:random-tokens"})
    found = build_inputs(drawn, ModelInputs("TinyBert", 300, closes=True), tokenizer=made)
    assert (found.ids[:, 0].tolist(), found.ids[:, -1].tolist()) == ([256] * 2, [257] * 2)
