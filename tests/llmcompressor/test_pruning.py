"""SparseGPT and Wanda: equal masks, and values to 1e-5 of the weight's norm, with and without a pattern."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.llmcompressor.conftest import Both

pytestmark = pytest.mark.llmcompressor
LINEAR: dict[str, Any] = {"targets": ["Linear"], "ignore": ["re:.*lm_head"]}
CASES: list[dict[str, Any]] = [
    {"SparseGPTModifier": {**LINEAR, "sparsity": 0.5, "mask_structure": "2:4"}},
    {"SparseGPTModifier": {"targets": [r"re:model\.layers\.\d+$"], "sparsity": 0.6, "block_size": 96}},
    {"WandaPruningModifier": {**LINEAR, "sparsity": 0.5, "mask_structure": "2:4"}},
    {"WandaPruningModifier": {"targets": ["LlamaDecoderLayer"], "sparsity": 0.4}},
]


@pytest.mark.parametrize(
    "modifiers", CASES, ids=lambda case: "-".join(map(str, next(iter(case.values())).values()))[:60]
)
def test_masks_and_values_are_equal(modifiers: dict[str, Any], both: Both) -> None:
    theirs, ours = both(modifiers)
    assert theirs.keys() == ours.keys()
    pruned = [name for name, value in ours.items() if float((value == 0).float().mean()) > 0.2]
    assert len(pruned) == 28
    for name, wanted in theirs.items():
        assert torch.equal(ours[name] == 0, wanted == 0), name
        assert float((ours[name] - wanted).norm() / wanted.norm()) < 1e-5, name
