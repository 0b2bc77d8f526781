"""What was measured as plain data that can be read again, number for number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from armor_recipes.evaluation.contract import Measured, Measurement, Value
from armor_recipes.evaluation.perplexity import Perplexity


def to_record(found: Measured | None) -> dict[str, Any] | None:
    """Plain data of what was measured; None stays None."""
    return None if found is None else asdict(found)  # type: ignore[call-overload]  # both are dataclasses


def from_record(data: Mapping[str, Any] | None) -> Measured | None:
    """What `to_record` gave these data of. Raises TypeError or KeyError for others."""
    if data is None:
        return None
    if "nll" in data:
        return Perplexity(**{**data, **{key: tuple(data[key]) for key in ("bos", "losses", "targets")}})
    values = (Value(**{**value, "interval": _pair(value["interval"])}) for value in data["values"])
    rows = {name: tuple(row) for name, row in data["rows"].items()}
    return Measurement(**{**data, "values": tuple(values), "datasets": tuple(data["datasets"]), "rows": rows})


def _pair(interval: Any) -> tuple[float, float] | None:
    return None if interval is None else (interval[0], interval[1])
