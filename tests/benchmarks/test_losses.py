"""benchmarks/losses.py: how rows are compared window by window, printed and kept."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import pytest

from tests.benchmarks.test_rivals import benchmark


@pytest.fixture(scope="module")
def losses() -> ModuleType:
    return benchmark("losses")


def test_a_row_is_compared_window_by_window(losses: ModuleType) -> None:
    base = [1.0, 2.0, 3.0, 6.0]
    perplexity, gap, percent = losses.compared([loss + 0.5 for loss in base], base)
    assert perplexity == pytest.approx(math.exp(3.5))
    assert [gap["value"], *gap["interval"]] == pytest.approx([0.5] * 3)  # windows differ, what a window loses does not
    assert [percent["value"], *percent["interval"]] == pytest.approx([100 * math.expm1(0.5)] * 3)
    _, gap, _ = losses.compared([1.0, 2.0, 3.0, 7.0], base)
    assert gap["value"] == 0.25
    assert gap["interval"][0] == 0.0 < 0.25 < gap["interval"][1] <= 1.0


def test_a_table_is_printed_and_kept(losses: ModuleType, tmp_path: Path) -> None:
    rows = [
        {"row": "dense", "essays perplexity": 28.456, "essays gap": None},
        {"row": "ours", "essays perplexity": 33, "essays gap": {"value": 0.148, "interval": [0.1, 0.2]}},
    ]
    assert losses.markdown(rows, {"perplexity": ".2f", "gap": ".3f"}).splitlines() == [
        "| row | essays perplexity | essays gap |",
        "|---|---|---|",
        "| dense | 28.46 | – |",
        "| ours | 33.00 | 0.148 [0.100, 0.200] |",
    ]
    assert "no table yet" in losses.markdown([], {})
    losses.show(rows, {}, tmp_path / "new" / "rows.json")
    assert json.loads((tmp_path / "new" / "rows.json").read_text()) == {"rows": rows}
    losses.show(rows, {}, None)
