"""Measurements of models that later runs need not take again: a file each in the user's cache folder.

A file is taken at its word only where it says itself what it is of, and that is what is asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from armor_recipes import paths
from armor_recipes.checkpoint.files import write_whole
from armor_recipes.errors import ResourceError

#: What a measurement depends on: plain data, as JSON writes it.
Of = Mapping[str, Any]


def cache_folder() -> Path:
    """The folder of all measurements."""
    return paths.cache_folder("measurements")


def cache_file(of: Of) -> Path:
    """The file of one measurement."""
    text = json.dumps(of, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()}.json"


def kept_costs(of: Of, names: list[str]) -> tuple[dict[str, float] | None, str]:
    """The costs of those modules that a file holds, and else None, with what is wrong with the file if there is one."""
    try:
        file = cache_file(of)
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        return None, ""
    except (OSError, RuntimeError, ValueError) as error:
        return None, f"a kept measurement cannot be read ({type(error).__name__}: {error}): measured again"
    if not isinstance(content, dict) or content.get("of") != json.loads(json.dumps(of)):
        return None, f"{file} is of another measurement: measured again"
    costs = content.get("costs")
    if not isinstance(costs, dict) or list(costs) != names or not all(map(_is_cost, costs.values())):
        return None, f"{file} is damaged: measured again"
    return costs, ""


def keep_costs(of: Of, costs: Mapping[str, float]) -> str:
    """Write a measurement; what keeps it from being written, which costs no more than time, is returned."""
    try:
        file = cache_file(of)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, (json.dumps({"of": of, "costs": costs}, indent=1) + "\n").encode())
    except (OSError, RuntimeError, ResourceError) as error:
        return f"the measurement is not kept for later runs ({type(error).__name__}: {error})"
    return ""


def _is_cost(value: object) -> bool:
    return isinstance(value, float | int) and not isinstance(value, bool) and isfinite(value) and value >= 0
