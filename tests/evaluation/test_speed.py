"""Speed: what is called how often, and what is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertModel

from armor_recipes.calibration.inputs import ModelInputs
from armor_recipes.errors import PlanError
from armor_recipes.evaluation import Reading, Room
from armor_recipes.evaluation import speed as timing
from armor_recipes.evaluation.speed import Speed, SpeedSpec
from tests.support.engine import make_model


def test_medians_and_the_slowest_and_fastest_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SpeedSpec(prompt_tokens=8, new_tokens=3, turns=3)
    measure = Speed.read(spec, Reading(None, ModelInputs(vocab_size=96), None))  # type: ignore[arg-type]
    # Of each turn: its start, the first token, the last one; the first turn is slow and does not count.
    clock = iter([0.0, 100.0, 900.0, *(0.0, 1.0, 2.0), *(0.0, 2.0, 5.0), *(0.0, 4.0, 8.0)])
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    model, shapes = make_model(), []
    model.get_input_embeddings().register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    found = measure.after(model, Room(tmp_path))
    assert shapes == [(1, 8), (1, 1), (1, 1), (1, 1)] * 4
    prompt, decode = found.values
    assert (prompt.name, prompt.value, prompt.interval) == ("prompt_tokens_per_second", 4.0, (2.0, 8.0))
    assert (decode.name, decode.value, decode.interval) == ("decode_tokens_per_second", 1.0, (0.75, 3.0))
    assert found.details["dtype"] == "float32"
    assert found.details["threads"] == torch.get_num_threads()


def test_who_writes_no_tokens() -> None:
    config = BertConfig(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(PlanError, match="speed: BertModel predicts no next token, so that it writes no tokens"):
        Speed.check(BertModel(config))
