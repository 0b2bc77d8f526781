from __future__ import annotations

import contextlib
import json
import os
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


def chat(tmp_path: Path, tokenizer, *messages: object, template: str = TEMPLATE) -> str:
    """The one row that these messages make."""
    path = write(tmp_path / "a.jsonl", lines({"chat": list(messages)}))
    tokenizer.chat_template = template
    try:
        return load(path, messages_column="chat", tokenizer=tokenizer).rows[0]
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "the "}, {"type": "text", "text": "cat", "cache": 1}], "the cat"),
        (["the ", {"type": "text", "text": "cat"}, ""], "the cat"),
        ([{"type": "text", "text": "{'type'}"}], "{'type'}"),
        ([], ""),
        (None, ""),
        ("", ""),
    ],
)
def test_content_in_parts_and_no_content(tmp_path, tokenizer, content, text):
    assert chat(tmp_path, tokenizer, {"role": "user", "content": content}) == f"<user>{text}"


def test_a_tool_call_needs_no_content_and_keeps_its_keys(tmp_path, tokenizer):
    call = {"role": "assistant", "tool_calls": [{"name": "rain"}], "name": None}
    template = "{% for m in messages %}<{{ m.keys() | sort | join(' ') }}>{{ m['content'] }}{% endfor %}"
    found = chat(tmp_path, tokenizer, call, {"role": "tool", "content": "wet", "tool_calls": None}, template=template)
    assert found == "<content role tool_calls><content role>wet"


def test_parts_of_a_table(tmp_path, tokenizer):
    """A table gives every part and message the keys that any of them has."""
    rows = [[{"role": "user", "content": [{"type": "text", "text": "the cat", "image": None}]}]]
    tokenizer.chat_template = TEMPLATE
    try:
        found = load(table(tmp_path / "a.parquet", chat=rows), messages_column="chat", tokenizer=tokenizer)
    finally:
        tokenizer.chat_template = None
    assert found.rows == ("<user>the cat",)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (
            {"role": "user", "content": [{"type": "image", "url": "x"}, {"type": "text", "text": "the cat"}]},
            r"a\.jsonl:1, message 1: a part of `content` is of type 'image', and only text.*take the part or the row out",
        ),
        ({"role": "user", "content": [{"type": None, "text": "a"}]}, r"message 1: a part .* is of type None"),
        ({"role": "user", "content": [{"type": "text"}]}, r"message 1: .* is a text part without text"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, r"is a text part without text"),
        ({"role": "user", "content": [{"text": "a"}]}, r"message 1: \{'text': 'a'\} is no part of `content`"),
        ({"role": "user", "content": [3]}, r"message 1: 3 is no part of `content`"),
        ({"role": "user", "content": 3}, r"message 1: `content` is 3, not text"),
        ({"role": "user", "content": {"text": "a"}}, r"message 1: `content` is \{'text': 'a'\}, not text"),
        ({"role": 3, "content": "a"}, r"a\.jsonl:1.*list of \{role, content\}"),
        ({"role": None, "content": "a"}, r"a\.jsonl:1.*list of \{role, content\}"),
        ({"role": "user"}, r"a\.jsonl:1.*list of \{role, content\}"),
        ({"role": "assistant", "tool_calls": None}, r"a\.jsonl:1.*list of \{role, content\}"),
        ({"from": "human", "value": "a"}, r"a\.jsonl:1.*'from'.*list of \{role, content\}"),
        ([{"role": "user", "content": "a"}], r"a\.jsonl:1.*list of \{role, content\}"),
    ],
)
def test_messages_that_would_be_misread_are_refused(tmp_path, tokenizer, message, expected):
    with pytest.raises(InputError, match=expected):
        chat(tmp_path, tokenizer, message)


def test_messages_as_a_string_of_json(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", lines({"chat": json.dumps(CHAT)}))
    tokenizer.chat_template = TEMPLATE
    try:
        with pytest.raises(InputError, match=r"a\.jsonl:1.*where a string is JSON, write the list itself"):
            load(path, messages_column="chat", tokenizer=tokenizer)
    finally:
        tokenizer.chat_template = None


def test_a_template_for_parts_that_leaves_all_text_out(tmp_path, tokenizer):
    template = (
        "{% for m in messages %}<{{ m['role'] }}>{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endfor %}"
    )
    with pytest.raises(InputError, match=r"a\.jsonl:1.*'<user>', without a word of the messages.*template for text"):
        chat(tmp_path, tokenizer, {"role": "user", "content": "the cat"}, template=template)


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
        (
            "a.jsonl",
            b'{"text": "a"}\n{"text": "b", "text": "c"}\n',
            r"a\.jsonl:2 .*the key 'text' stands twice.*correct",
        ),
        ("a.jsonl", b'{"text": "a", "n": [{"x": 1, "x": 2}]}\n', r"a\.jsonl:1 .*the key 'x' stands twice"),
        ("a.json", b'[{"text": "a", "text": "b"}]', r"a\.json cannot .*the key 'text' stands twice in .*'b'"),
        ("a.jsonl", b'{"text": ["a"]}\n', r"a\.jsonl:1.*\['a'\] \(list\), not text"),
        ("a.jsonl", b'{"text": "a\0"}\n', r"a\.jsonl:1 is not JSON"),
        ("a.parquet", b"", r"cannot read .*a\.parquet as parquet"),
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


def struct_of_two(name: str) -> pa.Array:
    return pa.StructArray.from_arrays([pa.array(["a"]), pa.array(["b"])], names=[name, name])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pa.array([{"a": "x"}]), r"row 1: the text column holds \{'a': 'x'\} \(dict\), not text"),
        (pa.array([["x"]]), r"row 1: .*\(list\), not text"),
        (pa.array([b"x"]), r"row 1: .*b'x' \(bytes\), not text"),
        (pa.array([2**30], pa.date32()), r"cannot read .*a\.parquet as parquet: days"),
        (struct_of_two("x"), r"cannot read .*a\.parquet as parquet: .*duplicate field names"),
        (pa.array([], pa.string()), r"holds no text: 0 rows"),
        (pa.nulls(3), r"holds no text: 3 rows"),
    ],
)
def test_parquet_of_other_columns(tmp_path, column, message):
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        load(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", [pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_of_every_kind_of_text(tmp_path, kind):
    parquet.write_table(pa.table({"text": pa.array(["one", None, "one"]).cast(kind)}), tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet").rows == ("one", "", "one")


def test_parquet_with_a_column_twice(tmp_path):
    columns = [pa.array(["a"]), pa.array(["b"]), pa.array(["c"])]
    parquet.write_table(pa.Table.from_arrays(columns, names=["text", "text", "body"]), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet has 2 columns 'text'; rename or remove all but one"):
        load(tmp_path / "a.parquet")
    assert load(tmp_path / "a.parquet", text_column="body").rows == ("c",)


@pytest.mark.parametrize(
    ("name", "content", "rows"),
    [
        ("a.jsonl", b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n', ("a", "b")),
        ("a.json", b'\xef\xbb\xbf[{"text": "a"}]\r\n', ("a",)),
        ("a.txt", b"a\0b", ("a\0b",)),
        ("a.jsonl", b'{"text": "a\\u0000b"}', ("a\0b",)),
    ],
)
def test_marks_line_ends_and_nulls(tmp_path, name, content, rows):
    assert load(write(tmp_path / name, content)).rows == rows


@pytest.mark.timeout(20)
@pytest.mark.parametrize("within", [False, True])
def test_pipes_and_devices_are_not_waited_for(tmp_path, within):
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "a.txt")
    with pytest.raises(InputError, match=r"a\.txt is a pipe or a device, not a file; write its text to a file"):
        load(folder if within else folder / "a.txt")
    (folder / "a.txt").unlink()
    (folder / "a.txt").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"a\.txt is a pipe or a device"):
        load(folder if within else folder / "a.txt")


@pytest.mark.parametrize("target", ["nowhere", "b.txt"])
def test_a_link_that_leads_nowhere_is_not_passed_over(tmp_path, target):
    write(tmp_path / "a.txt", "text")
    (tmp_path / "b.txt").symlink_to(target)
    for dataset in (tmp_path, tmp_path / "b.txt"):
        with pytest.raises(InputError, match=r"b\.txt is a link that leads nowhere; mend or remove it"):
            load(dataset)


def test_linked_folders_are_read_unless_they_lead_back(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "a.txt", name)
    (tmp_path / "one" / "b").symlink_to(tmp_path / "two")
    assert load(tmp_path / "one").rows == ("one", "two")
    (tmp_path / "two" / "b").symlink_to(tmp_path / "one")
    with pytest.raises(InputError, match=r"one/b/b is a link to a folder that it lies in; remove it"):
        load(tmp_path / "one")


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", "text")

    def refuse(self):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match=r"cannot read .*: Permission denied; check"):
        load(tmp_path)


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
