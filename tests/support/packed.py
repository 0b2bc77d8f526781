"""Tiny random models and made-up factorisations, seeded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.writer import write_checkpoint
from armor_recipes.solver.quantize import Numbers, kept, round_to_nearest, spread
from armor_recipes.solver.result import SparseFactors

SIZES = {"vocab_size": 96, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama-attention-bias-gqa": lambda: LlamaForCausalLM(
        LlamaConfig(**SIZES, num_key_value_heads=2, attention_bias=True)
    ),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=4, tie_word_embeddings=True)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=False)),
    "qwen2-tied": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, num_key_value_heads=1, tie_word_embeddings=True)),
}
IGNORED = ("lm_head", "model.layers.1.mlp.up_proj")


@dataclass(frozen=True)
class MadeUp:
    """Looks like a solver's result."""

    a: Tensor
    core: Tensor
    mask: Tensor
    b: Tensor


def random_mask(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Exactly 2 of 4, uniformly."""
    return (torch.rand(rows, columns // 4, 4, generator=generator).argsort(-1) < 2).view(rows, columns)


def made_up(rows: int, columns: int, block_size: tuple[int, int], generator: torch.Generator) -> MadeUp:
    """Random factors near the identity and a random core."""
    mask = random_mask(rows, columns, generator)
    a, b = (
        torch.eye(size) + 0.1 * torch.randn(side // size, size, size, generator=generator)
        for side, size in zip((rows, columns), block_size, strict=True)
    )
    return MadeUp(a, 0.1 * torch.randn(rows, columns, generator=generator) * mask, mask, b)


def quantized(
    factors: MadeUp,
    dtype: torch.dtype,
    *,
    bits: int,
    group: int | None = None,
    numbers: Numbers = "int",
    activations: str | None = None,
) -> PackedLinear:
    """The same with integers, or 8-bit floats, for the kept values."""
    values = kept(factors.core, factors.mask)
    how: dict[str, Any] = {"num_bits": bits, "group_size": group, "numbers": numbers, "dtype": dtype}
    found = replace(round_to_nearest(values, torch.ones_like(values), **how), activations=activations)
    core = spread(found.dequantize(), factors.mask)
    return PackedLinear.from_factors(SparseFactors(factors.a, core, factors.mask, factors.b, found), dtype)


def block_size_of(name: str) -> tuple[int, int]:
    """Different sizes, square and rectangular, in one model."""
    return (16, 8) if "mlp" in name else (4, 32) if "v_proj" in name else (8, 8)


def session_model(
    kind: str,
    dtype: torch.dtype = torch.bfloat16,
    *,
    share: bool = False,
    bits: int | None = None,
    **core: Any,
) -> tuple[PreTrainedModel, dict[str, PackedLinear]]:
    """Make a model in float32 as a session holds it after solving (Ŵ in its weights), and its layers.

    With `share`, modules of one parent and block size have one B; with `bits`, cores are quantised, as `core` says (`quantized`).
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MODELS[kind]().eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        noise = 0.05 * torch.randn(parameter.shape, generator=generator)
        parameter.data = (parameter.data + noise).to(dtype).float()
    layers: dict[str, PackedLinear] = {}
    first: dict[tuple[object, ...], MadeUp] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name not in IGNORED:
            factors = made_up(module.out_features, module.in_features, block_size_of(name), generator)
            if share:
                reads = name.rpartition(".")[0], block_size_of(name), module.in_features
                factors = replace(factors, b=first.setdefault(reads, factors).b.clone())
            if bits is None:
                layers[name] = PackedLinear.from_factorization(factors, dtype)
            else:
                layers[name] = quantized(factors, dtype, bits=bits, **core)
            module.weight.data = layers[name].fold(torch.float32)
    return model, layers


def write(
    kind: str,
    folder: Path,
    dtype: torch.dtype = torch.bfloat16,
    *,
    share: bool = False,
    bits: int | None = None,
    core: Mapping[str, Any] | None = None,
    group: int | None = None,
    **options: object,
) -> PreTrainedModel:
    """Write a session's model into a new folder and return it."""
    how = {} if bits is None else {"group": group, **(core or {})}
    model, layers = session_model(kind, dtype, share=share, bits=bits, **how)
    folder.mkdir(parents=True)
    write_checkpoint(model, layers, folder, dtype=dtype, **options)  # type: ignore[arg-type]
    return model


def logits(model: PreTrainedModel) -> Tensor:
    """Of two fixed rows of tokens, float32 or whatever the model computes in."""
    tokens = (torch.arange(48) * 7 % SIZES["vocab_size"]).view(2, 24)
    with torch.no_grad():
        return model(tokens).logits


def changed(written: Mapping[str, Any], kept: Mapping[str, Any], inside: str = "") -> set[str]:
    """Dotted keys that compressed-tensors' schema dropped or changed. What it adds is null, and in 0.17 `observer`'s default."""
    found = set()
    for key in written.keys() | kept.keys():
        before, after = written.get(key), kept.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            found |= changed(before, after, f"{inside}{key}.")
        elif before != after and not (key == "observer" and key not in written):
            found.add(inside + key)
    return found
