"""SmoothQuant: norms and weights to 1e-5, by structure and by mappings."""

from __future__ import annotations

from typing import Any

import pytest

from tests.llmcompressor.conftest import Both

pytestmark = pytest.mark.llmcompressor
CASES: list[dict[str, Any]] = [
    {},
    {"smoothing_strength": 0.8, "mappings": [[["re:.*q_proj", "re:.*k_proj", "re:.*v_proj"], "re:.*input_layernorm"]]},
]


@pytest.mark.parametrize("fields", CASES, ids=["structure", "mappings"])
def test_weights_are_equal(fields: dict[str, Any], both: Both, model: Any) -> None:
    theirs, ours = both({"SmoothQuantModifier": fields})
    assert theirs.keys() == ours.keys()
    for name, wanted in theirs.items():
        assert float((ours[name] - wanted).norm() / wanted.norm()) < 1e-5, name
    smoothed = [name for name, value in ours.items() if "layernorm" in name and float(value.abs().max()) > 0]
    assert len(smoothed) == 8
