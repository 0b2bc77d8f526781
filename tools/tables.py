"""Writes the tables of results into the pages, from the JSON that a benchmark wrote: `python tools/tables.py [PAGE...]`.

A page says where a table comes from, and how its rows read:

    <!-- table of benchmarks/rows.json
    | row | perplexity | bytes |
    | {name} | {perplexity[handbook]:.2f} | {bytes:.1%} |
    -->

The file lies under `docs`, and holds a list of rows, or a mapping with `rows` or a sweep's `points`.
Each row is put into the second line, as by `str.format`; null is a dash, and `{"value": x, "interval": [low, high]}` all three.
What stands from there to `<!-- end table -->` is written anew. `tests/docs/test_tables.py` compares.
"""

from __future__ import annotations

import json
import re
import string
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_TABLE = re.compile(
    r"(?P<head><!-- table of (?P<file>\S+)\n(?P<names>\|[^\n]*\|)\n(?P<row>\|[^\n]*\|)\n-->\n).*?(?P<end><!-- end table -->)",
    re.DOTALL,
)


class _Cells(string.Formatter):
    """`str.format` with a dash for null, and with the interval of a figure that has one: `0.12 [0.10, 0.14]`."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if isinstance(value, dict):
            ends = ", ".join(self.format_field(end, format_spec) for end in value["interval"] or 2 * [value["value"]])
            return f"{self.format_field(value['value'], format_spec)} [{ends}]"
        return "–" if value is None else str(super().format_field(value, format_spec))


def written(text: str) -> str:
    """A page's text with all its tables written anew. Raises `KeyError` for a row without a figure that the page asks for."""

    def table(match: re.Match[str]) -> str:
        content = json.loads((ROOT / "docs" / match["file"]).read_text(encoding="utf-8"))
        rows = content["rows" if "rows" in content else "points"] if isinstance(content, dict) else content
        lines = [match["names"], "|" + "---|" * (match["names"].count("|") - 1)]
        lines += [_Cells().vformat(match["row"], (), row) for row in rows]
        return match["head"] + "\n".join(lines) + "\n" + match["end"]

    return _TABLE.sub(table, text)


if __name__ == "__main__":
    for page in (
        map(Path, sys.argv[1:]) if sys.argv[1:] else [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    ):
        page.write_text(written(page.read_text(encoding="utf-8")), encoding="utf-8")
