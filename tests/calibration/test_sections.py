"""Sections of local files: each row is in one of them, and a section's rows are those of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from armor_recipes.calibration import sections
from armor_recipes.calibration.files import Column, read_path
from armor_recipes.calibration.sections import Sections, path_sections
from armor_recipes.errors import InputError

TEXT = Column("text", "text_column")
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ENDS = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n \n"])


def found(path: Path, size: int = 64, column: Column = TEXT) -> Sections:
    return path_sections(path, column, size)


def values(of: Sections) -> list[object]:
    """Of all sections in the order of the file."""
    return [cell.value for number in range(of.count) for cell in of.rows(number)]


@given(rows=st.lists(st.tuples(TEXTS, ENDS), max_size=12), size=st.integers(1, 200), ended=st.booleans())
def test_each_line_is_in_the_stretch_where_it_begins(tmp_path_factory, rows, size, ended):
    path = tmp_path_factory.mktemp("rows") / "a.jsonl"
    data = b"".join(json.dumps({"text": row}, ensure_ascii=False).encode() + end for row, end in rows)
    path.write_bytes(data if ended else data.rstrip())
    of = found(path, size)
    assert values(of) == [row for row, _ in rows] == [cell.value for cell in read_path(path, TEXT)]
    assert of.count == -(-path.stat().st_size // size)
    for number in range(of.count):
        for cell in of.rows(number):
            at = int(cell.where.rpartition(" ")[2])
            assert number * size <= at < (number + 1) * size
            assert json.loads(path.read_bytes()[at:].partition(b"\n")[0]) == {"text": cell.value}


@given(text=st.one_of(TEXTS, st.lists(TEXTS, max_size=12).map("\n".join)), size=st.integers(4, 60))
def test_pieces_of_a_text_are_the_whole(tmp_path_factory, text, size):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    pieces = values(found(path, size))
    assert "".join(pieces).replace("\ufeff", "") == text.replace("\ufeff", "")  # one that begins a piece is left out
    assert all(pieces)
    assert all(len(piece.encode()) <= 2 * size for piece in pieces)


def test_pieces_of_a_text_begin_with_lines_where_there_are_any(tmp_path):
    (tmp_path / "a.md").write_text("".join(f"line {number}\n" for number in range(300)))
    pieces = values(found(tmp_path / "a.md", 100))
    assert len(pieces) == -(-(tmp_path / "a.md").stat().st_size // 100)
    assert all(piece.startswith("line ") and piece.endswith("\n") for piece in pieces)
    (tmp_path / "a.md").write_text("é" * 500)
    assert [len(piece) for piece in values(found(tmp_path / "a.md", 99))] == [50, *[49, 50] * 4, 49, 5]


@pytest.mark.parametrize("group", [1, 3, 7, 100])
def test_row_groups_are_sections(tmp_path, monkeypatch, group):
    monkeypatch.setattr(sections, "_ROWS", 2)
    rows = [*map(str, range(20)), None]
    table = pa.table({"text": rows, "n": list(range(21)), "turns": [[{"role": "user", "content": "a"}]] * 21})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=group)
    of = found(tmp_path / "a.parquet")
    assert of.count == -(-21 // group)
    assert values(of) == rows
    assert next(of.rows(of.count - 1)).where.endswith(f"a.parquet, row group {of.count}, row 1")
    turns = found(tmp_path / "a.parquet", column=Column("turns", "messages_column"))
    assert values(turns) == [[{"role": "user", "content": "a"}]] * 21


def test_sections_of_a_folder_are_those_of_its_files(tmp_path):
    (tmp_path / "b").mkdir()
    for number, name in enumerate(["a.jsonl", "b/a.jsonl", "c.jsonl"]):
        rows = range(number * 10, number * 10 + 10)
        (tmp_path / name).write_text("".join(f'{{"text": "{row}"}}\n' for row in rows if number != 1))
    parquet.write_table(pa.table({"text": ["x"]}), tmp_path / "d.parquet")
    (tmp_path / ".hidden.csv").write_text("no")
    of = found(tmp_path)
    assert values(of) == [*map(str, range(10)), *map(str, range(20, 30)), "x"]
    assert of.count == -(-140 // 64) + -(-150 // 64) + 1


def test_nothing_is_read_before_a_row_is_asked_for(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\nno JSON\n')
    rows = found(tmp_path / "a.jsonl").rows(0)
    assert next(rows).value == "a"
    with pytest.raises(InputError, match=r"a\.jsonl, line at byte 14 is not JSON"):
        next(rows)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"body": 1}\n', r"a\.jsonl, line at byte 14 has no column 'text'.*body"),
        ("a.jsonl", b'["b"]\n', r"a\.jsonl, line at byte 0 is a list, not an object"),
        ("a.jsonl", b'{"text": "\xe9"}\n', r"a\.jsonl, line at byte 0 is not UTF-8"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', r"line at byte 0 cannot.*the key 'text' stands twice"),
        (
            "a.jsonl",
            b'\n{"text": "' + b"a" * 200 + b'"}\n',
            r"line at byte 1 is longer than 100 bytes; .*`stream: false`",
        ),
        ("a.txt", b"one\n" + b"x" * 80 + b"\n\xff", r"a\.txt, from byte \d+ is not UTF-8"),
        ("a.json", b'[{"text": "a"}]', r"a\.json is one list.*\.jsonl file, or `stream: false`"),
        ("a.csv", b"text\n", r"\.csv is none of \.txt"),
        ("a.parquet", b"PAR1 not really", r"cannot read .*a\.parquet as parquet"),
        ("a.parquet", b"", r"cannot read .*a\.parquet as parquet"),
    ],
)
def test_what_is_wrong_is_named_with_its_place(tmp_path, monkeypatch, name, content, message):
    monkeypatch.setattr(sections, "_LINE", 100)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        values(found(tmp_path / name))


def test_columns_are_checked_before_anything_is_read(tmp_path):
    parquet.write_table(pa.table({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet has no column 'text'.*body"):
        found(tmp_path / "a.parquet")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(InputError, match=r"plain text.*`messages_column` 'turns'"):
        found(tmp_path / "a.txt", column=Column("turns", "messages_column"))


def test_a_file_that_goes_away(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    of = found(tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").unlink()
    with pytest.raises(InputError, match=r"cannot read .*a\.jsonl: No such file"):
        values(of)
    with pytest.raises(InputError, match=r"no such file or folder"):
        found(tmp_path / "a.jsonl")
