"""Hub datasets as streams, by the streaming classes of `datasets` on local files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from armor_recipes.calibration import stream
from armor_recipes.calibration.inputs import InputSet
from armor_recipes.calibration.tokens import build_tokens
from armor_recipes.errors import InputError
from armor_recipes.recipe.schema import AtMost, CalibrationSpec

VOCAB = 257
load_dataset = datasets.load_dataset


def build(tokenizer, **keys) -> InputSet:
    keys = {"dataset": "some/where", "samples": AtMost(at_most=500), "sequence_length": 6, **keys}
    return build_tokens(CalibrationSpec(**keys), tokenizer=tokenizer, vocab_size=VOCAB)


def texts_of(found: InputSet, tokenizer) -> list[str]:
    return [tokenizer.decode(row) for row in found.ids]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Callable[..., Path]:
    """Puts a dataset of one split onto a hub of its own: `some/where` is a folder."""

    def put(files: dict[str, bytes | pa.Table], split: str = "train") -> Path:
        folder = tmp_path / "hub"
        folder.mkdir()
        for name, content in files.items():
            if isinstance(content, bytes):
                (folder / name).write_bytes(content)
            else:
                parquet.write_table(content, folder / name, row_group_size=3)
        kind = "parquet" if next(iter(files)).endswith("parquet") else "json"
        paths = {split: sorted(map(str, folder.iterdir()))}

        def load(name: str, configuration: str | None, **keys: object) -> object:
            assert (name, configuration) == ("some/where", None)
            return load_dataset(kind, data_files=paths, cache_dir=str(tmp_path / "cache"), **keys)

        monkeypatch.setattr(datasets, "load_dataset", load)
        return folder

    return put


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def shards(*, of: int = 12, rows: int = 5) -> dict[str, bytes]:
    """Documents `sssrr` of shard and row."""
    return {
        f"{shard:03}.jsonl": lines(*({"text": f"{shard:03}{row:02}", "n": row} for row in range(rows)))
        for shard in range(of)
    }


def test_a_hub_id_is_a_stream_unless_the_recipe_says_otherwise(hub, tokenizer):
    hub(shards())
    found, again, whole = build(tokenizer), build(tokenizer, stream=True), build(tokenizer, stream=False)
    assert found.sha256 == again.sha256 != whole.sha256
    assert [s.sources[0].stream for s in (found, again, whole)] == [True, True, False]
    assert [s.sources[0].available for s in (found, again, whole)] == [None, None, 60]
    expected = [f"{shard:03}{row:02}<end>" for shard in range(12) for row in range(5)]
    assert sorted(texts_of(found, tokenizer)) == sorted(texts_of(whole, tokenizer)) == expected
    assert build(tokenizer, seed=1).sha256 != found.sha256


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_shards_are_read_in_turn_in_an_order_of_the_seed(hub, monkeypatch, tokenizer, kind):
    monkeypatch.setattr(stream, "_ROWS", 16)
    files = shards(of=40)
    if kind == "parquet":
        rows = {name: [json.loads(line)["text"] for line in content.splitlines()] for name, content in files.items()}
        files = {f"{name[:3]}.parquet": pa.table({"text": texts, "n": [0] * 5}) for name, texts in rows.items()}
    hub(files)
    found = build(tokenizer, samples=16)
    texts = texts_of(found, tokenizer)
    assert found.sources[0].documents == 16
    assert len({text[:3] for text in texts}) == stream._OPEN
    assert {text[3:5] for text in texts} == {"00", "01"}
    assert texts != sorted(texts)
    other = {text[:3] for text in texts_of(build(tokenizer, samples=16, seed=1), tokenizer)}
    assert other != {text[:3] for text in texts}


def test_no_other_column_is_decoded(hub, tokenizer):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": b"no image", "path": None}] * 4, kind)
    table = pa.table({"text": ["aaaaa", "bbbbb", "ccccc", None], "image": images})
    features = datasets.Features({"text": datasets.Value("string"), "image": datasets.Image()})
    hub({"a.parquet": table.replace_schema_metadata(features.arrow_schema.metadata)})
    found = build(tokenizer)
    assert sorted(texts_of(found, tokenizer)) == ["aaaaa<end>", "bbbbb<end>", "ccccc<end>"]
    assert (found.sources[0].documents, found.sources[0].empty) == (3, 1)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_chats_of_a_split(hub, tokenizer, kind):
    """As HuggingFaceH4/ultrachat_200k: `split: train_sft`, and messages beside a prompt."""
    turns = [[{"content": f"{row:02}", "role": "user"}, {"content": "yes", "role": "assistant"}] for row in range(20)]
    rows = [{"prompt": turn[0]["content"], "prompt_id": "x", "messages": turn} for turn in turns]
    hub({"a.jsonl": lines(*rows)} if kind == "jsonl" else {"a.parquet": pa.Table.from_pylist(rows)}, "train_sft")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    try:
        found = build(tokenizer, split="train_sft", messages_column="messages")
        with pytest.raises(InputError, match=r"some/where, shard 1, row 1.*'00'.*list of \{role, content\}"):
            build(tokenizer, split="train_sft", messages_column="prompt")
        with pytest.raises(InputError, match=r"cannot load split 'train' of hub dataset 'some/where'.*train_sft"):
            build(tokenizer, messages_column="messages")
    finally:
        tokenizer.chat_template = None
    assert sorted(texts_of(found, tokenizer)) == [f"{row:02}yes<end>" for row in range(20)]


@pytest.mark.parametrize("split", ["train[:1%]", "train[10:]+train"])
def test_a_slice_of_a_stream_says_what_to_do(hub, tokenizer, split):
    hub(shards())
    with pytest.raises(InputError, match=r"hub dataset 'some/where': `split` 'train\[.*is a slice.*`stream: false`"):
        build(tokenizer, split=split)
    assert build(tokenizer, split="train[:50%]", stream=False).sources[0].documents == 30


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_column_that_is_not_there(hub, tokenizer, kind):
    rows = [{"body": "a", "n": 1}]
    hub({"a.jsonl": lines(*rows)} if kind == "jsonl" else {"a.parquet": pa.Table.from_pylist(rows)})
    with pytest.raises(InputError, match=r"some/where.* has no column 'text'; set `text_column` .*: body, n"):
        build(tokenizer)


def test_a_row_that_is_no_text(hub, tokenizer):
    hub({"a.jsonl": lines({"text": ["a"]})})
    with pytest.raises(InputError, match=r"some/where, shard 1, row 1: the text column holds \['a'\] \(list\)"):
        build(tokenizer)


def test_what_breaks_midway_names_shard_and_row(hub, monkeypatch, tokenizer):
    hub(shards(of=1))

    def rows():
        yield {"text": "aaaaa"}
        yield {"text": "bbbbb"}
        raise ConnectionError("no route\nat all")

    broken = datasets.IterableDataset.from_generator(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: broken)
    with pytest.raises(
        InputError, match=r"some/where, shard 1 cannot be read on after 2 rows: no route; check the"
    ) as caught:
        build(tokenizer)
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(stream, "_ROWS", 2)
    assert sorted(texts_of(build(tokenizer, samples=2), tokenizer)) == ["aaaaa<end>", "bbbbb<end>"]


def test_bad_json_midway(hub, tokenizer, caplog):
    hub({"a.jsonl": lines({"text": "a"}, {"text": "b"}) + b'{"text": }\n'})
    with pytest.raises(InputError, match=r"(shard 1 cannot be read on after 0 rows|cannot load split 'train').*JSON"):
        build(tokenizer)


@pytest.mark.parametrize("error", [ConnectionError("no route\nat all"), ValueError("Unknown split"), RuntimeError()])
def test_a_hub_that_cannot_be_reached(monkeypatch, tokenizer, error):
    def fail(*_: object, **keys: object) -> None:
        assert keys == {"split": "train", "streaming": True}
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"'some/where'.*check the name.*local file.*builtin:pydoc") as caught:
        build(tokenizer)
    assert caught.value.__cause__ is error


def test_addresses_are_no_streams(tokenizer):
    with pytest.raises(InputError, match=r"is an address.*download"):
        build(tokenizer, dataset="https://example.org/a.txt")
