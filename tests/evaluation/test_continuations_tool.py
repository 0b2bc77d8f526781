"""`tools/continuations.py` writes the set that is built in, and sets of other texts."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

from armor_recipes import builtin

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "continuations.py"))


def test_a_set_of_files_and_the_one_that_is_built_in(tmp_path: Path) -> None:
    output = tmp_path / "set.jsonl"
    TOOL["main"](["--output", str(output)])
    assert [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()] == builtin.continuations()
    texts = builtin.documents("speeches")[:3]
    files = [tmp_path / f"{place}.txt" for place in range(3)]
    for file, text in zip(files, texts, strict=True):
        file.write_text(text, encoding="utf-8")
    TOOL["main"]([*map(str, files), "--count", "20", "--seed", "7", "--output", str(output)])
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 20
    assert all(row["context"] + row["choices"][row["answer"]] in "\f".join(texts) for row in rows)
