from __future__ import annotations

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from armor_recipes import builtin
from armor_recipes.calibration.text import Documents, load_documents
from armor_recipes.errors import InputError

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def load(dataset, *, split="train", text_column="text", **keys) -> Documents:
    return load_documents(str(dataset), split=split, text_column=text_column, **keys)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def table(path: Path, **columns: list[object]) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", [".txt", ".md", ".TXT"])
def test_a_text_file_is_one_document_as_it_stands(tmp_path, suffix):
    path = write(tmp_path / f"a{suffix}", "\ufeff one\r\n\ntwo: café\n")
    assert load(path).rows == (" one\r\n\ntwo: café\n",)


def test_json_lines_keep_order_and_count_empty_rows(tmp_path):
    path = write(
        tmp_path / "a.jsonl", lines({"text": "one"}, {"text": " \n"}, {"text": None}) + "\n" + lines({"text": "two"})
    )
    found = load(path)
    assert found.rows == ("one", " \n", "", "two")
    assert found.documents == ("one", "two")
    assert found.empty == 2


def test_a_json_line_may_hold_any_line_separator_of_unicode(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "one\u2028two"}\n')
    assert load(path).rows == ("one\u2028two",)


def test_json_is_a_list_of_objects(tmp_path):
    path = write(tmp_path / "a.json", json.dumps([{"text": "one"}, {"text": "two"}]))
    assert load(path).rows == ("one", "two")


def test_parquet_reads_one_column_and_nulls_are_empty_rows(tmp_path):
    path = table(tmp_path / "a.parquet", body=["one", None, "two"], other=[1, 2, 3])
    found = load(path, text_column="body")
    assert found.rows == ("one", "", "two")
    assert found.empty == 1


def test_a_folder_is_read_in_the_order_of_paths_without_hidden_files(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".cache").mkdir()
    write(tmp_path / "c.txt", "three")
    write(tmp_path / "b" / "x.md", "two")
    write(tmp_path / "a.jsonl", lines({"text": "one"}))
    write(tmp_path / ".cache" / "y.bin", "no")
    write(tmp_path / ".hidden", "no")
    assert load(tmp_path).rows == ("one", "two", "three")


def test_builtin_texts_are_their_documents():
    assert load("builtin:pydoc-heldout").documents == tuple(builtin.documents("pydoc-heldout"))


def test_a_hub_id_goes_through_datasets_with_its_configuration(monkeypatch):
    asked = []

    def fake(name, configuration, *, split):
        asked.append((name, configuration, split))
        return datasets.Dataset.from_dict({"body": ["one", None]})

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load("some/where:raw", split="train[:1%]", text_column="body").rows == ("one", "")
    assert load("elsewhere", text_column="body").empty == 1
    assert asked == [("some/where", "raw", "train[:1%]"), ("elsewhere", None, "train")]
    with pytest.raises(InputError, match=r"hub dataset 'elsewhere' has no column 'text'.*`text_column`.*body"):
        load("elsewhere")


@pytest.mark.parametrize("error", [ConnectionError("no route\nat all"), ValueError("Unknown split"), RuntimeError()])
def test_a_hub_failure_says_what_to_do(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(InputError, match=r"'some/where'.*check the name.*local file.*builtin:pydoc") as caught:
        load("some/where")
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
def test_messages_are_written_by_the_chat_template(tmp_path, tokenizer, name):
    path = tmp_path / name
    if name.endswith("parquet"):
        table(path, chat=[CHAT, None])
    else:
        rows = [{"chat": CHAT}, {"chat": []}]
        write(path, json.dumps(rows) if name == "a.json" else lines(*rows))
    tokenizer.chat_template = TEMPLATE
    try:
        found = load(path, messages_column="chat", tokenizer=tokenizer)
    finally:
        tokenizer.chat_template = None
    assert found.rows == ("<user>Hi<assistant>Ho", "")


@pytest.mark.parametrize(
    ("value", "template", "message"),
    [
        ("text", TEMPLATE, r"a\.jsonl:1.*'text'.*list of \{role, content\}.*`text_column`"),
        ([{"content": "no role"}], TEMPLATE, r"a\.jsonl:1.*no role"),
        ([1], TEMPLATE, r"a\.jsonl:1.*\[1\]"),
        (CHAT, "{{ raise_exception('not so') }}", r"a\.jsonl:1.*chat template refuses.*not so"),
        (CHAT, None, r"no chat template.*`text_column`"),
    ],
)
def test_messages_that_cannot_be_used(tmp_path, tokenizer, value, template, message):
    path = write(tmp_path / "a.jsonl", lines({"chat": value}))
    tokenizer.chat_template = template
    try:
        with pytest.raises(InputError, match=message):
            load(path, messages_column="chat", tokenizer=tokenizer)
    finally:
        tokenizer.chat_template = None


def test_messages_need_a_tokenizer(tmp_path):
    path = write(tmp_path / "a.jsonl", lines({"chat": CHAT}))
    with pytest.raises(InputError, match="no tokenizer"):
        load(path, messages_column="chat")


@pytest.mark.parametrize("dataset", ["a.txt", "builtin:pydoc"])
def test_plain_text_has_no_messages(tmp_path, monkeypatch, dataset):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.txt", "text")
    tokenizer = SimpleNamespace(chat_template=TEMPLATE)
    with pytest.raises(InputError, match=r"plain text.*`messages_column` 'chat'.*null"):
        load(dataset, messages_column="chat", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"ok\xff", r"a\.txt is not UTF-8: byte 2 is 0xff.*convert"),
        ("a.txt", b"", r"holds no text: 1 rows, all of them empty"),
        ("a.jsonl", b"", r"holds no text: 0 rows"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xe9"}\n', r"a\.jsonl:2 is not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": }\n', r"a\.jsonl:2 is not JSON: Expecting value at column 10"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"a\.jsonl:2 is a list, not an object"),
        (
            "a.jsonl",
            b'{"text": "a"}\n{"body": "b", "n": 1}\n',
            r"a\.jsonl:2 has no column 'text'.*`text_column`.*body, n",
        ),
        ("a.jsonl", b"{}\n", r"its columns: none"),
        ("a.jsonl", b'{"text": 3}\n', r"a\.jsonl:1.*3 \(int\), not text.*`text_column`"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', r"a\.jsonl:1: character 0 is a lone surrogate"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", r"a\.jsonl:1 cannot be read as JSON"),
        ("a.jsonl", b"[" * 200_000, r"a\.jsonl:1 cannot be read as JSON"),
        ("a.json", b'{"text": "a"}\n{"text": "b"}\n', r"not JSON: Extra data at line 2, column 1.*named \.jsonl"),
        ("a.json", b'{"text": "a"}', r"holds an object, not a list.*\.jsonl"),
        ("a.json", b'[{"text": "a"}, null]', r"a\.json, row 2 is null, not an object"),
        ("a.parquet", b"PAR1 not really", r"cannot read .*a\.parquet as parquet"),
        ("a.csv", b"text\n", r"\.csv is none of \.txt, \.md, \.jsonl, \.json, \.parquet"),
        ("README", b"text\n", r"no suffix is none of"),
    ],
)
def test_a_bad_file_is_named_with_its_place_and_a_remedy(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message):
        load(path)


def test_parquet_columns_are_listed_and_checked(tmp_path):
    path = table(tmp_path / "a.parquet", body=["one"], n=[1])
    with pytest.raises(InputError, match=r"a\.parquet has no column 'text'.*body, n"):
        load(path)
    with pytest.raises(InputError, match=r"a\.parquet, row 1.*1 \(int\)"):
        load(path, text_column="n")


def test_parquet_of_invalid_utf8(tmp_path):
    raw = pa.array([b"\xff\xfe"], pa.binary())
    broken = pa.Array.from_buffers(pa.string(), 1, raw.buffers())
    parquet.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"cannot read .*a\.parquet as parquet"):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ("./nowhere", r"no such file or folder: nowhere"),
        ("nowhere.jsonl", r"no such file or folder: nowhere\.jsonl"),
        ("/nowhere/at/all", r"no such file or folder"),
        ("https://example.org/a.txt", r"is an address.*download"),
        ("builtin:nothing", r"'nothing'.*builtin:pydoc"),
        ("builtin:random-tokens", r"calibration only"),
        ("nul\0byte", r"neither a path nor a hub id"),
        ("~nobody-of-this-name/a.txt", r"neither a path nor a hub id"),
        ("x" * 5000, r"neither a path nor a hub id"),
    ],
)
def test_a_dataset_that_is_nowhere(dataset, message):
    with pytest.raises(InputError, match=message) as caught:
        load(dataset)
    assert len(str(caught.value)) < 500


def test_a_folder_without_files_or_with_other_files(tmp_path):
    with pytest.raises(InputError, match=r"holds no files; put .*\.jsonl"):
        load(tmp_path)
    write(tmp_path / "a.txt", "text")
    write(tmp_path / "b.arrow", "text")
    with pytest.raises(InputError, match=r"b\.arrow: \.arrow is none of"):
        load(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt", "text")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(InputError, match=r"cannot read .*a\.txt: Permission denied; check"):
        load(path)


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=20), min_size=1, max_size=8))
def test_json_lines_round_trip(tmp_path_factory, rows):
    path = write(tmp_path_factory.mktemp("rows") / "a.jsonl", lines(*({"text": row} for row in rows)))
    if not any(row.strip() for row in rows):
        with pytest.raises(InputError, match="holds no text"):
            load(path)
        return
    found = load(path)
    assert found.rows == tuple(rows)
    assert len(found.documents) + found.empty == len(rows)


@given(st.binary(max_size=60), st.sampled_from(["a.txt", "a.jsonl", "a.json", "a.parquet"]))
def test_no_bytes_raise_anything_but_input_error(tmp_path_factory, content, name):
    path = write(tmp_path_factory.mktemp("bytes") / name, content)
    state = torch.random.get_rng_state()
    with contextlib.suppress(InputError):
        load(path)
    assert torch.equal(state, torch.random.get_rng_state())
