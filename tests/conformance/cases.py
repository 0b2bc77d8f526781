"""The rows and columns of the matrix: recipes that make each modifier legal, and the models that they are run on.

A new modifier of a kind that there is has rows without a line here, but for fields that it cannot do without: `FIELDS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from armor_recipes.modifiers import FactorModifier, Quantizer, Rearranger, Refiner, Smoother, modifiers

EXPECTED = Path(__file__).parent / "expected.json"

#: Fields of a modifier beside `targets` where its defaults do not fit models of 32 channels, or it cannot do without.
FIELDS: dict[str, dict[str, Any]] = {
    "ARMORModifier": {"block_size": 8, "iterations": 3},
    "AWQModifier": {"n_grid": 4},
    "BlockRefineModifier": {"epochs": 1, "held_out": 0.4},
    "DistillationModifier": {"epochs": 1, "held_out": 0.4},
    "GPTQModifier": {"config_groups": {"all": {"weights": {"num_bits": 4, "group_size": 16}}}},
    "QuantizationModifier": {"config_groups": {"all": {"weights": {"num_bits": 4, "group_size": 16}}}},
    "SparseGPTModifier": {"pattern": "2:4"},
    "WandaPruningModifier": {"pattern": "2:4"},
}
#: Fields that a modifier needs on one model.
FIELDS_ON: dict[tuple[str, str], dict[str, Any]] = {
    ("ChannelPermutationModifier", "Conv1D"): {"producers": {"c_proj": ["c_fc"]}},
}
#: Whose error at the layer a row claims not to exceed, on the same inputs: row → (row, measure). Either weighs W − Ŵ by the squares
#: of the inputs (`diagonal`) or is the error of the outputs (`outputs`).
CLAIMS: dict[str, tuple[str, str]] = {
    "ARMORModifier": ("NoWagModifier", "diagonal"),
    "GPTQModifier": ("QuantizationModifier", "outputs"),
    "SparseGPTModifier": ("MagnitudeModifier", "outputs"),
    "WandaPruningModifier": ("MagnitudeModifier", "diagonal"),
}


@dataclass(frozen=True, slots=True)
class Column:
    """A model: one block with sides of 32 and 64.

    Attributes:
        name: as the page has it.
        dtype: of all its tensors as stored.
        slow: whether its runs are no part of the default tests; every property has a column that is.
        make: the model.
        modules: names of the linear modules that recipes target, before which it has the block's name.
        targets: the pattern that matches these and no other.
        consumer: a pattern that matches those whose input channels other linear modules of them make.
    """

    name: str
    dtype: torch.dtype
    slow: bool
    make: Callable[[], PreTrainedModel]
    modules: tuple[str, ...]
    targets: str
    consumer: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Case:
    """A row: one modifier, and in its recipe those before and after it that make sense of it."""

    modifier: str
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()

    def __str__(self) -> str:
        words = [self.modifier, *(f"after {name}" for name in self.before), *(f"before {name}" for name in self.after)]
        return " ".join(words)

    def recipe(self, column: Column) -> dict[str, dict[str, Any]]:
        """The modifiers of its recipe with their fields, in order."""
        return {name: fields(name, column) for name in (*self.before, self.modifier, *self.after)}


def fields(name: str, column: Column) -> dict[str, Any]:
    """What a recipe gives of a modifier."""
    kind = modifiers()[name]
    targets = {"targets": [column.consumer if issubclass(kind, Rearranger) else column.targets]}
    return {**targets, **FIELDS.get(name, {}), **FIELDS_ON.get((name, column.name), {})}


@cache
def cases() -> tuple[Case, ...]:
    """The rows of every registered modifier, by its kind."""
    return tuple(case for name in modifiers() for case in _cases(name))


def _cases(name: str) -> Iterator[Case]:
    kind = modifiers()[name]
    armor, pruning, rounding = "ARMORModifier", "NoWagModifier", "QuantizationModifier"
    if issubclass(kind, (Refiner, FactorModifier)):
        yield Case(name, before=(armor,))
    elif issubclass(kind, Rearranger):
        yield Case(name, after=(pruning,))
        yield Case(name, after=(armor,))
    elif issubclass(kind, Smoother):
        if not kind.needs_after:
            yield Case(name)
        yield Case(name, after=(rounding,))
    elif issubclass(kind, Quantizer):
        yield Case(name)
        yield Case(name, before=(armor,))
        yield Case(name, before=(pruning,))
    else:
        yield Case(name)


def _llama(*, bias: bool) -> PreTrainedModel:
    sizes: dict[str, Any] = {**SIZES, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=bias, mlp_bias=bias))


def _gpt2() -> PreTrainedModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=32, n_embd=32, n_inner=64, n_layer=1, n_head=4))


def _qwen() -> PreTrainedModel:
    experts: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 64, "head_dim": 8}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, num_key_value_heads=2, **experts))


SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
}
_LLAMA: dict[str, Any] = {
    "modules": (
        *(f"model.layers.0.self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
        *(f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")),
    ),
    "targets": r"re:.*(self_attn|mlp)\..*_proj$",
    "consumer": r"re:.*mlp\.down_proj$",
}
COLUMNS = (
    Column("no bias, bf16", torch.bfloat16, True, lambda: _llama(bias=False), **_LLAMA),
    Column("no bias, fp32", torch.float32, True, lambda: _llama(bias=False), **_LLAMA),
    Column("bias, bf16", torch.bfloat16, False, lambda: _llama(bias=True), **_LLAMA),
    Column("bias, fp32", torch.float32, True, lambda: _llama(bias=True), **_LLAMA),
    Column(
        "Conv1D",
        torch.float32,
        False,
        _gpt2,
        tuple(f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
        r"re:.*\.(c_attn|c_proj|c_fc)$",
        r"re:.*mlp\.c_proj$",
    ),
    Column(
        "expert",
        torch.bfloat16,
        False,
        _qwen,
        tuple(
            f"model.layers.0.mlp.experts.{expert}.{name}_proj" for expert in (0, 1) for name in ("gate", "up", "down")
        ),
        r"re:.*experts\..*_proj$",
        r"re:.*experts\..*down_proj$",
    ),
)


def expected() -> dict[str, dict[str, Any]]:
    """What the committed records say: by row and column."""
    found: dict[str, dict[str, Any]] = json.loads(EXPECTED.read_text(encoding="utf-8"))
    return found


def model_of(column: Column) -> PreTrainedModel:
    """The column's model with random weights, norms and biases that are nobody's defaults; the global RNG is left as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = column.make().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    cast: torch.nn.Module = model
    cast.to(column.dtype)
    return model


def mapping(group: Mapping[str, Mapping[str, Any]], model: Path, output: Path) -> dict[str, Any]:
    """A whole recipe of these modifiers."""
    data = {"dataset": "builtin:random-tokens", "samples": 6, "sequence_length": 16, "batch_size": 2}
    return {
        "model": str(model),
        "calibration": data,
        "conformance_stage": {"conformance_modifiers": {name: dict(one) for name, one in group.items()}},
        "output": {"path": str(output)},
    }
