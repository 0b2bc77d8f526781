"""What report.json holds of each module: its place, its bytes, and its loss by iteration."""

from __future__ import annotations

from typing import Any

from armor_recipes.report.manifest import Facts

#: Points of all curves together, and the most and the fewest of one.
_POINTS, _MOST, _FEWEST = 60_000, 120, 8


def module_rows(facts: Facts) -> dict[str, dict[str, Any]]:
    """Plain data by module: block, shape `(O, I)`, bytes as planned, and `losses` at `iterations`, thinned evenly on a log scale.

    A weight that was solved in closed form has no curve.
    """
    plans, layers = facts.plan.stored, facts.plan.layers
    most = max(_FEWEST, min(_MOST, _POINTS // max(1, len(facts.modules))))
    rows: dict[str, dict[str, Any]] = {}
    for name, result in facts.modules.items():
        plan = plans[name]
        rows[name] = {
            "block": layers[plan.layer] if plan.layer < len(layers) else name,
            "shape": [plan.d_out, plan.d_in],
            "bytes_before": plan.bytes_before,
            "bytes_after": plan.bytes_after,
            "factor_bytes": plan.factor_bytes,
        }
        if len(result.losses) > 1:
            places = thinned(len(result.losses), most)
            rows[name] |= {"iterations": places, "losses": [float(f"{result.losses[n]:.5g}") for n in places]}
    return rows


def thinned(count: int, most: int) -> list[int]:
    """At most so many of the numbers below `count`, the first and the last among them, ever further apart."""
    if count <= most:
        return list(range(count))
    last = count - 1
    return sorted({0, *(round(last ** (step / (most - 2))) for step in range(most - 1))})
