"""Figures of an evaluation as rows for people and as data for programs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from armor_recipes.evaluation import Evaluation, Measured
from armor_recipes.report.names import without_folders

#: The measure whose figures stand in the manifest under `before` and `after` themselves.
_FIRST = "perplexity"


def evaluation_rows(evaluations: Sequence[Evaluation]) -> Iterator[tuple[str, str, str, str]]:
    """For each figure its name, before, after, and the ratio; of figures with intervals `0.91 [0.89, 0.93]`.

    The first of a measure says what was measured on.
    """
    for found in evaluations:
        dense = {} if found.before is None else {value.name: value for value in found.before.values}
        where = f" ({on_what(found.after)})"
        for value in found.after.values:
            before = dense.get(value.name)
            ratio = f"{value.value / before.value:.3f}" if before is not None and before.value else ""
            name = value.name.replace("_", " ") + where
            where = ""
            yield name, "" if before is None else before.text(), value.text(), ratio


def on_what(measured: Measured) -> str:
    """How much of which data: `51255 tokens of builtin:pydoc-heldout`."""
    return f"{measured.size} of {' + '.join(map(without_folders, measured.datasets))}"


def evaluation_dict(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """For the manifest: perplexity as `before` and `after`, null where not measured, and the other measures by their names."""
    by_name = {found.name: _both(found) for found in evaluations}
    first = by_name.pop(_FIRST, {"before": None, "after": None})
    return {**first, **by_name}


def evaluation_json(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """For `--json`: every measure by its name."""
    return {found.name: _both(found) for found in evaluations}


def _both(found: Evaluation) -> dict[str, Any]:
    return {"before": None if found.before is None else found.before.to_dict(), "after": found.after.to_dict()}
