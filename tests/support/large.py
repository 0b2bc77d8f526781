"""Models of the size of the largest mixtures of experts, on the meta device: linear modules in blocks and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn


def mixture(
    *, layers: int = 94, experts: int = 128, hidden: int = 4096, intermediate: int = 1536, every: int = 1
) -> Any:
    """By default Qwen3-MoE's 235-billion shape: each layer attention, a router and experts of three linear modules.

    With `every: 2` each second layer has an MLP in place of its experts, as Llama 4 Maverick has.
    """
    with torch.device("meta"):
        model: Any = type("Mixture", (nn.Module,), {})()
        model.model = nn.Module()
        model.model.embed_tokens = nn.Embedding(151936, hidden)
        model.model.layers = nn.ModuleList(
            _layer(hidden, intermediate, experts if (i + 1) % every == 0 else 0) for i in range(layers)
        )
        model.lm_head = nn.Linear(hidden, 151936, bias=False)
    model.config = SimpleNamespace(hidden_size=hidden, num_attention_heads=64, num_key_value_heads=4, head_dim=128)
    return model.to(torch.bfloat16)


def _layer(hidden: int, intermediate: int, experts: int) -> nn.Module:
    layer: Any = nn.Module()
    layer.self_attn = nn.Module()
    for name, rows, columns in (("q", 8192, hidden), ("k", 512, hidden), ("v", 512, hidden), ("o", hidden, 8192)):
        layer.self_attn.add_module(f"{name}_proj", nn.Linear(columns, rows, bias=False))
    layer.mlp = _mlp(hidden, intermediate)
    if experts:
        layer.mlp = nn.Module()
        layer.mlp.gate = nn.Linear(hidden, experts, bias=False)
        layer.mlp.experts = nn.ModuleList(_mlp(hidden, intermediate) for _ in range(experts))
    return layer


def _mlp(hidden: int, intermediate: int) -> nn.Module:
    mlp = nn.Module()
    for name, rows, columns in (
        ("gate", intermediate, hidden),
        ("up", intermediate, hidden),
        ("down", hidden, intermediate),
    ):
        mlp.add_module(f"{name}_proj", nn.Linear(columns, rows, bias=False))
    mlp.act_fn = nn.SiLU()
    return mlp
