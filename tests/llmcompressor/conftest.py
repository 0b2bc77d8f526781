"""The embedded model in float32, and one recipe run by llm-compressor and by us on the same windows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from armor_recipes.builtin import model_folder
from armor_recipes.calibration.tokens import build_tokens
from armor_recipes.events import PhaseStarted
from armor_recipes.integrations.models import load_model
from armor_recipes.session import Session
from tests.support.engine import make_job

Weights = dict[str, Tensor]
#: Takes the modifiers of a recipe by name, and fields that only ours have; gives llm-compressor's weights and ours, with scales.
#: Where `without` names one, ours are those before it: it stands in a stage of its own.
Both = Callable[..., tuple[Weights, Weights]]
#: Few tokens leave H so close to singular that float32, in which llm-compressor factorises it, decides near ties otherwise.
CALIBRATION = {"dataset": "builtin:pydoc", "samples": 96, "sequence_length": 128, "batch_size": 1}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the embedded model in float32."""
    folder, source = tmp_path_factory.mktemp("float32"), model_folder("stdlib-llama")
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def both(model: Path) -> Both:
    """Runs a recipe's modifiers, in the words of llm-compressor, in its `oneshot` and in a session of ours."""
    return runs(model)


def runs(model: Path, **calibration: Any) -> Both:
    """What runs a recipe on a folder's model in both."""

    def run(modifiers: Mapping[str, Any], without: str = "", **own: Any) -> tuple[Weights, Weights]:
        stage = {"prune_stage": {"prune_modifiers": dict(modifiers)}}
        fields = {k: {**v, **own.get(k, {})} for k, v in modifiers.items()}
        late = {k: fields.pop(k) for k in list(fields) if k == without}
        our_stages: dict[str, Any] = {"prune_stage": {"prune_modifiers": fields}}
        if late:
            our_stages["late_stage"] = {"late_modifiers": late}
        data = {**CALIBRATION, **calibration}
        job = make_job({"model": str(model), "calibration": data, **our_stages, "output": {"path": "out"}})
        (spec,) = {entry.config.calibration for entry in job.recipe.modifiers if entry.config.calibration}
        inputs = build_tokens(spec, tokenizer=AutoTokenizer.from_pretrained(model), vocab_size=2048)
        theirs = oneshot(model, stage, inputs.ids)
        ours = load_model(job.source, device=job.device)
        before: Weights = {}

        def keep(event: object) -> None:
            if event == PhaseStarted("stage late_stage"):
                before.update(_weights(ours))

        makings = {"stored_dtype": torch.float32, "observer": keep}
        with Session(job.recipe, job.plan, ours, job.modifiers, {spec: inputs}, **makings) as session:
            session.run()
        if late:
            return _weights(theirs), before
        quantised = {name: result.quantized for name, result in session.results.items() if result.quantized is not None}
        scales = {f"{name}.weight_scale": layer.tensors["weight_scale"] for name, layer in quantised.items()}
        return _weights(theirs), {**_weights(ours), **scales}

    return run


def oneshot(model: Path, recipe: Mapping[str, Any], ids: Tensor) -> torch.nn.Module:
    """llm-compressor's `oneshot` of a folder with a recipe, on windows of ids."""
    import llmcompressor
    import yaml

    found: torch.nn.Module = llmcompressor.oneshot(
        model=AutoModelForCausalLM.from_pretrained(model),
        recipe=yaml.safe_dump(recipe),
        dataset=Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}),
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
    )
    return found


def _weights(model: torch.nn.Module) -> Weights:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
