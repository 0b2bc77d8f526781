"""The look at a model before a run: of which samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import armor_recipes
from armor_recipes.session import looking


def test_of_windows_of_several_texts_the_first_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = []
    survey: Any = looking.survey

    def noted(model: Any, stacks: Any, names: Any, sample: Any, *rest: Any) -> Any:
        samples.append(sample["input_ids"].shape)
        return survey(model, stacks, names, sample, *rest)

    monkeypatch.setattr(looking, "survey", noted)
    texts = [{"dataset": f"builtin:{name}", "weight": 1} for name in ("pydoc", "speeches")]
    recipe = {
        "model": "builtin:stdlib-llama",
        "calibration": {"dataset": texts, "samples": 4, "sequence_length": 32},
        "prune_stage": {"row_modifiers": {"NoWagModifier": {"targets": [r"re:.*layers\.0\.mlp\.up_proj$"]}}},
        "output": {"path": str(tmp_path / "out")},
    }
    (module,) = armor_recipes.apply(recipe).modules.values()
    assert module.tokens == 128
    assert samples == [(1, 32)]
