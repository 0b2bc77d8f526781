"""Correlations between the runs of a sweep: `python tools/correlations.py docs/benchmarks/experiments/calibration-samples.json`.

Pearson's and Spearman's, of the modules' mean loss, perplexity, accuracy and divergence from the dense model, of each pair that was
measured, with Pearson's 95 % interval by Fisher's z. Runs are taken as independent, which those of one seed or one size are not.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from statistics import correlation
from typing import Any


def figures(row: dict[str, Any]) -> dict[str, float]:
    """What a point of a sweep measured, by name."""
    measured = row["evaluation"]
    found = {"loss": row["loss"], "perplexity": row["perplexity_after"]}
    if "multiple_choice" in measured:
        found["accuracy"] = measured["multiple_choice"]["after"]["accuracy"]["value"]
    if "fidelity" in measured:
        found["divergence"] = measured["fidelity"]["after"]["kl_divergence"]["value"]
    return {name: float(value) for name, value in found.items() if value is not None}


def ranks(values: Sequence[float]) -> list[float]:
    """Places from 0 up; equal values share the mean of theirs."""
    return [sum(v < value for v in values) + (sum(v == value for v in values) - 1) / 2 for value in values]


def interval(r: float, count: int) -> tuple[float, float]:
    """The 95 % interval of Pearson's r of `count` pairs, at least four, by Fisher's z."""
    z, half = math.atanh(max(-1 + 1e-12, min(1 - 1e-12, r))), 1.959964 / math.sqrt(count - 3)
    return math.tanh(z - half), math.tanh(z + half)


def correlations(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each pair of figures of the points that are done."""
    found = [figures(row) for row in rows if row["status"] == "done"]
    result = []
    for one, other in combinations(found[0], 2):
        x, y = ([row[name] for row in found] for name in (one, other))
        pearson = correlation(x, y)
        result.append(
            {
                "name": f"{one}, {other}",
                "runs": len(found),
                "pearson": pearson,
                "interval": interval(pearson, len(found)),
                "spearman": correlation(ranks(x), ranks(y)),
            }
        )
    return result


if __name__ == "__main__":
    rows = correlations(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["points"])
    print(json.dumps({"rows": rows}, indent=1))
