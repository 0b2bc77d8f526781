"""Evaluate a model that is already there: a checkpoint of ours, or any dense model."""

from __future__ import annotations

import os

from armor_recipes.checkpoint.reader import read_config
from armor_recipes.compute import plain_torch
from armor_recipes.evaluation.perplexity import Perplexity, evaluate
from armor_recipes.integrations.models import load_model, load_tokenizer, open_model
from armor_recipes.integrations.transformers import load
from armor_recipes.paths import user_path
from armor_recipes.recipe.schema import ModelSpec, PerplexitySpec
from armor_recipes.run.planning import parse_device
from armor_recipes.run.refusals import resource_errors
from armor_recipes.runtime.backends import BACKEND_VARIABLE


@plain_torch()
def evaluate_model(model: str, spec: PerplexitySpec, *, device: str = "cpu") -> Perplexity:
    """Perplexity of a checkpoint folder of ours or of a dense model, computed in float32 on a CPU.

    Raises InputError where the model or the text cannot be read.
    """
    target = parse_device(device)
    packed = user_path(model).is_dir() and read_config(user_path(model)).get("quantization_config") is not None
    source = open_model(ModelSpec(id=model), device=target, compressed=packed)
    with resource_errors():
        if packed:
            # Never `auto`: it may take another way, and give other bits, on every machine and from run to run.
            backend = os.environ.get(BACKEND_VARIABLE) or "folded"
            loaded = load(model, backend=backend, dtype=source.compute_dtype, device=target)
        else:
            loaded = load_model(source, device=target)
        return evaluate(loaded, spec, load_tokenizer(source))
