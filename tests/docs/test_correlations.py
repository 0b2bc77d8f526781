"""tools/correlations.py: correlations of a sweep's figures."""

from __future__ import annotations

import json
import runpy
from typing import Any

import pytest

from tests.support.pages import ROOT

TOOL = runpy.run_path(str(ROOT / "tools" / "correlations.py"))


def point(loss: float, perplexity: float, accuracy: float, status: str = "done") -> dict[str, Any]:
    choice = {"before": None, "after": {"accuracy": {"value": accuracy, "interval": [0, 1]}}}
    return {
        "status": status,
        "loss": loss,
        "perplexity_after": perplexity,
        "evaluation": {"multiple_choice": choice},
    }


def test_pairs_of_figures_of_the_points_that_are_done() -> None:
    points = [point(1, 1, 4), point(2, 3, 3), point(3, 2, 2), point(4, 5, 1), point(9, 9, 9, "failed")]
    rows = {row["name"]: row for row in TOOL["correlations"](points)}
    assert list(rows) == ["loss, perplexity", "loss, accuracy", "perplexity, accuracy"]
    assert rows["loss, accuracy"]["pearson"] == pytest.approx(-1)
    row = rows["loss, perplexity"]
    assert row["pearson"] == pytest.approx(5.5 / (5 * 8.75) ** 0.5)  # sums of products and squares about the means
    assert row["spearman"] == pytest.approx(0.8)  # 1 - 6 * (0 + 1 + 1 + 0) / (4 * 15)
    assert row["runs"] == 4
    low, high = row["interval"]
    assert low < row["pearson"] < high < 1


def test_equal_values_share_a_rank_and_the_interval_is_fishers() -> None:
    assert TOOL["ranks"]([3.0, 1.0, 3.0, 2.0]) == [2.5, 0.0, 2.5, 1.0]
    assert TOOL["interval"](0.5, 28) == pytest.approx((0.1560, 0.7358), abs=1e-4)  # tanh(0.5493 ± 0.3920)


def test_those_that_are_committed_are_of_the_committed_sweep() -> None:
    folder = ROOT / "docs" / "benchmarks"
    rows = json.loads((folder / "calibration-samples-correlations.json").read_text())["rows"]
    found = TOOL["correlations"](
        json.loads((folder / "experiments" / "calibration-samples.json").read_text())["points"]
    )
    assert rows == json.loads(json.dumps(found))
