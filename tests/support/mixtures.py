"""A tiny mixture of experts with linear experts, and what it takes to run a recipe on it in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from armor_recipes.calibration.tokens import build_tokens
from armor_recipes.model.forms import linearise
from armor_recipes.modifiers import modifiers
from armor_recipes.plan import Plan, make_plan
from armor_recipes.run.job import read_recipe
from armor_recipes.session import Session
from tests.support.engine import recipe

EXPERTS = r"re:.*\.experts\..*_proj"
COUNT, TOP_K, VOCABULARY = 4, 2, 96
LAYER = "model.layers.{}.mlp.experts"


def make_mixture(*, unwanted: Mapping[int, int] | None = None) -> PreTrainedModel:
    """Two layers of four experts, of which each token takes two. `unwanted`: by layer, an expert that no token takes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(
            MixtralConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                num_local_experts=COUNT,
                num_experts_per_tok=TOP_K,
            )
        ).eval()
        for parameter in model.parameters():
            parameter.data += 0.05 * torch.randn(parameter.shape)
    linearise(model)
    for layer, expert in (unwanted or {}).items():
        shun(model, layer, expert)
    return model


def shun(model: PreTrainedModel, layer: int, expert: int, *, but: int = 0) -> None:
    """Let the router of a layer never choose an expert, but for so many of the first tokens of its next calls."""
    gate = model.get_submodule(f"model.layers.{layer}.mlp.gate")
    forward: Any = gate.forward

    def routed(hidden: Tensor) -> Any:
        logits, scores, index = forward(hidden)
        index = index.clone()
        taken = {expert: (expert + 1) % COUNT}
        others = torch.tensor([[taken.get(e, e) for e in row] for row in index.tolist()])
        same = others[:, 0] == others[:, 1]
        others[same, 1] = (expert + 2) % COUNT
        others[:but, 1] = expert
        return logits, scores, others

    gate.forward = routed  # type: ignore[method-assign]


def mixture_recipe(*, moe: Mapping[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """A recipe for it; `fields` are modifiers by name, `calibration` is added to."""
    calibration = fields.pop("calibration", {})
    mapping = recipe("builtin:stdlib-llama", **fields)
    mapping["calibration"] |= calibration
    return mapping if moe is None else {**mapping, "moe": dict(moe)}


def plan_of(mapping: Mapping[str, Any], model: PreTrainedModel) -> tuple[Any, Plan, Mapping[str, Any]]:
    """Recipe, plan and modifiers."""
    read = read_recipe(mapping)
    known = modifiers()
    instances = {entry.key: known[entry.kind](entry.config) for entry in read.modifiers}
    return read, make_plan(read, model, instances, itemsize=4), instances


def run(mapping: Mapping[str, Any], model: PreTrainedModel) -> Session:
    """A session that was run on the model."""
    read, plan, instances = plan_of(mapping, model)
    specs = {e.config.calibration for e in read.modifiers if e.config.calibration is not None}
    tokens = {spec: build_tokens(spec, tokenizer=None, vocab_size=VOCABULARY) for spec in specs}
    with Session(read, plan, model, instances, tokens, stored_dtype=torch.float32) as session:
        session.run()
    return session
