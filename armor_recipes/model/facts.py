"""What a model's config says, read here and nowhere else: the text model's part of a composite config counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Numbers that every architecture calls by transformers' common names; None where a config does not tell.

    Attributes:
        hidden_size: width of what passes from block to block.
        vocab_size: rows of the token embedding.
        positions: the longest sequence, in tokens.
        heads: attention heads of a block.
        key_value_heads: heads of keys and values; as many as `heads` where a config names none.
        head_dim: width of one head.
        dtype: of the weights, by the config.
        attention: the attention implementation in use; None where transformers chose none.
        encoder_decoder: whether an encoder goes before the decoder.
        quantized: whether the config describes quantised or compressed weights.
    """

    hidden_size: int | None
    vocab_size: int | None
    positions: int | None
    heads: int | None
    key_value_heads: int | None
    head_dim: int | None
    dtype: torch.dtype | None
    attention: str | None
    encoder_decoder: bool
    quantized: bool


def facts_of(config: Any) -> ModelFacts:
    """The facts of a config; of None, none. Numbers are those of the text model where there are several."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    hidden, heads, width = (_number(text, name) for name in ("hidden_size", "num_attention_heads", "head_dim"))
    if width is None and hidden and heads:
        width = hidden // heads
    dtypes = (getattr(section, "dtype", None) for section in (config, text))
    attention = getattr(config, "_attn_implementation", None)
    return ModelFacts(
        hidden_size=hidden,
        vocab_size=_number(text, "vocab_size"),
        positions=_number(text, "max_position_embeddings"),
        heads=heads,
        key_value_heads=_number(text, "num_key_value_heads") or heads,
        head_dim=width,
        dtype=next((dtype for dtype in dtypes if isinstance(dtype, torch.dtype)), None),
        attention=attention if isinstance(attention, str) else None,
        encoder_decoder=getattr(config, "is_encoder_decoder", False) is True,
        quantized=getattr(config, "quantization_config", None) is not None,
    )


def model_facts(model: nn.Module) -> ModelFacts:
    """The facts of a model's config."""
    return facts_of(getattr(model, "config", None))


def _number(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else None
