"""Tables of results are those that `tools/tables.py` writes from the JSON of a benchmark; those that have none yet are counted."""

from __future__ import annotations

import json
import re
import runpy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.pages import PAGES, ROOT, without_blocks

TOOL = runpy.run_path(str(ROOT / "tools" / "tables.py"))
#: Pages whose numbers are not measured, or which are made of a JSON of their own (`make modifiers`, `make test-families`).
NOT_MEASURED = (
    "CHANGELOG.md",
    "docs/checkpoint.md",
    "docs/cli.md",
    "docs/modifiers.md",
    "docs/recipe.md",
    "docs/support.md",
)
#: Tables whose figures were measured before results were kept, by page. These numbers only go down.
WITHOUT_JSON = {
    "docs/benchmarks/h100.md": 2,
    "docs/benchmarks/h200.md": 3,
    "docs/benchmarks/other-models.md": 2,
    "docs/benchmarks/quality-smollm2.md": 3,
    "docs/results.md": 1,
    "docs/solver.md": 1,
}


def tables(text: str) -> Iterator[list[str]]:
    """The tables of a page, as lists of lines."""
    for match in re.finditer(r"(?:^ *\|.*\n)+", text + "\n", re.MULTILINE):
        yield match[0].splitlines()


def is_of_results(table: list[str]) -> bool:
    """Whether at least four cells below the heading begin with a number, or hold one with a fraction."""
    cells = [cell for row in table[2:] for cell in re.split(r"(?<!\\)\|", row)]
    return sum(bool(re.match(r"\s*\**[-+]?\d|.*\d\.\d", cell)) for cell in cells) >= 4


def test_tables_are_those_of_their_json() -> None:
    texts = {page: page.read_text(encoding="utf-8") for page in PAGES}
    assert [page.name for page, text in texts.items() if TOOL["written"](text) != text] == []
    assert all(text.count("<!-- table of ") == text.count("<!-- end table -->") for text in texts.values())


def test_every_other_table_of_results_is_counted() -> None:
    found = Counter[str]()
    for page in PAGES:
        name = page.relative_to(ROOT).as_posix()
        text = re.sub(r"<!-- table of .*?<!-- end table -->", "", without_blocks(page), flags=re.DOTALL)
        if name not in NOT_MEASURED:
            found.update(name for table in tables(text) if is_of_results(table))
    assert dict(found) == WITHOUT_JSON


def test_a_row_of_the_readme_is_one_of_the_results() -> None:
    (table,) = [table for table in tables(without_blocks(ROOT / "README.md")) if is_of_results(table)]
    assert set(table) <= set((ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines())


def test_a_table_is_written_from_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    rows = [
        {"name": "dense", "ppl": {"essays": 28.456}, "bytes": None},
        {"name": "ours", "ppl": {"essays": 33.1}, "bytes": 0.754},
    ]
    (tmp_path / "docs" / "rows.json").write_text(json.dumps({"host": "one", "rows": rows}))
    monkeypatch.setitem(TOOL["written"].__globals__, "ROOT", tmp_path)
    head = "<!-- table of rows.json\n| row | essays | bytes |\n| {name} | {ppl[essays]:.2f} | {bytes:.1%} |\n-->\n"
    page = f"# A\n\n{head}old\n<!-- end table -->\n\nend\n"
    wanted = "| row | essays | bytes |\n|---|---|---|\n| dense | 28.46 | – |\n| ours | 33.10 | 75.4% |\n"
    assert TOOL["written"](page) == f"# A\n\n{head}{wanted}<!-- end table -->\n\nend\n"
    with pytest.raises(KeyError, match="of"):
        TOOL["written"](page.replace("{name}", "{of}"))


def test_each_table_of_a_page_is_written_from_its_own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/a.json").write_text('[{"x": 1.5}]')
    (tmp_path / "docs/b.json").write_text('{"points": [{"x": null, "y": {"z": [2]}}]}')
    monkeypatch.setitem(TOOL["written"].__globals__, "ROOT", tmp_path)
    page = "<!-- table of a.json\n| x |\n| {x} |\n-->\n<!-- end table -->\n\ntext | with | bars |\n\n"
    page += "<!-- table of b.json\n| x | y |\n| {x} | {y[z][0]} |\n-->\n<!-- end table -->\n"
    found = TOOL["written"](page)
    assert [line for line in found.splitlines() if line.startswith("|")] == [
        "| x |", "| {x} |", "| x |", "|---|", "| 1.5 |", "| x | y |", "| {x} | {y[z][0]} |", "| x | y |", "|---|---|", "| – | 2 |",
    ]  # fmt: skip


def test_a_figure_has_its_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    rows = [
        {"the gap": {"value": 0.25, "interval": [0.125, 0.5]}},
        {"the gap": {"value": 2, "interval": None}},
        {"the gap": None},
    ]
    (tmp_path / "docs/a.json").write_text(json.dumps(rows))
    monkeypatch.setitem(TOOL["written"].__globals__, "ROOT", tmp_path)
    found = TOOL["written"]("<!-- table of a.json\n| x |\n| {the gap:.1%} |\n-->\n<!-- end table -->\n")
    assert found.splitlines()[6:-1] == ["| 25.0% [12.5%, 50.0%] |", "| 200.0% [200.0%, 200.0%] |", "| – |"]
