"""GPTQ against llm-compressor's: weights equal but for near ties, in the first layer, whose inputs are the same."""

from __future__ import annotations

from typing import Any

import pytest

from tests.llmcompressor.conftest import Both

pytestmark = pytest.mark.llmcompressor
FIRST: dict[str, Any] = {"targets": [r"re:model\.layers\.0\..*_proj$"]}
GROUPS = {"g": {"weights": {"num_bits": 4, "group_size": 64, "symmetric": False}, **FIRST}}
CASES: list[dict[str, Any]] = [
    {"GPTQModifier": {**FIRST, "scheme": "W4A16"}},
    {"GPTQModifier": {**FIRST, "scheme": "W8A8", "actorder": None}},
    {"GPTQModifier": {"config_groups": GROUPS, "block_size": 64, "dampening_frac": 0.1}},
]


@pytest.mark.parametrize("modifiers", CASES, ids=["W4A16", "W8A8", "groups"])
def test_weights_are_equal_but_for_near_ties(modifiers: dict[str, Any], both: Both) -> None:
    theirs, ours = both(modifiers)
    for name, wanted in ours.items():
        other = (theirs[name] - wanted).abs() > 1e-5 * wanted.abs().max()
        assert float(other.float().mean()) < 1e-3, name
