"""vLLM's side of experts: it runs those of a layer as one, whose packed tensors come expert by expert.

Importing this module needs vLLM: `plugin` imports it, and nothing else does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

from armor_recipes.checkpoint.config import VALUES, LayerSpec
from armor_recipes.checkpoint.serving import group_problem
from armor_recipes.errors import CheckpointError
from armor_recipes.integrations.vllm.parts import (
    COMPRESS_AGAIN,
    FusedLinear,
    InputFactors,
    Piece,
    PlainLinear,
    Share,
    lay_out,
)
from armor_recipes.integrations.vllm.running import Plain, Prepared, folded, folds
from armor_recipes.runtime.backends import Backend, choose_backend

#: vLLM's names for the layers of an expert, and the place of each among those that run as one.
_SHARDS = {"w1": ("w13", 0), "w3": ("w13", 1), "w2": ("w2", 0)}


@dataclass(frozen=True, slots=True)
class _Expert:
    """One expert of this process: gate and up as one layer, and down; filled as the files are read."""

    w13: FusedLinear | PlainLinear
    w2: FusedLinear | PlainLinear


class ArmorExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """Makes, loads and runs the experts of one layer, made of packed modules of the checkpoint and, here and there, of dense ones.

    On a CPU each expert runs on the tokens that are routed to it, by the backend that ARMOR_BACKEND names, `auto` without it;
    where that would fold, and on a GPU, the folded weights are handed to vLLM's own method, and the packed tensors are freed.
    """

    def __init__(self, moe: Any, factors: InputFactors, specs: Mapping[str, LayerSpec], prefix: str) -> None:
        super().__init__(moe)
        self.factors = factors
        self.specs = specs
        self.prefix = prefix
        self.experts: dict[int, _Expert] = {}
        self.running: dict[int, tuple[Prepared | Plain, Prepared | Plain]] | None = None
        self.sizes: dict[str, Any] = {}

    @property
    def is_monolithic(self) -> bool:
        """Whether vLLM's own kernel routes, too."""
        return self.running is None and bool(super().is_monolithic)

    @property
    def supports_eplb(self) -> bool:
        """No: packed experts stay where they were loaded."""
        return False

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Lay out the packed tensors of each expert of this process, empty.

        Raises:
            CheckpointError: where gate and up of an expert differ, or tensor parallelism would cut a block.
        """
        self.sizes = {
            "num_experts": num_experts,
            "hidden_size": hidden_size,
            "intermediate_size_per_partition": intermediate_size_per_partition,
            "params_dtype": params_dtype,
            **extra_weight_attrs,
        }
        for index in range(layer.global_num_experts):
            local = layer._map_global_expert_id_to_local_expert_id(index)
            if local != -1:
                self.experts[local] = self._expert(layer, index, params_dtype)
        self._register(layer)
        if self.moe.has_bias:
            self._register_biases(layer, params_dtype, extra_weight_attrs)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, and let the backend prepare what it runs from.

        Raises:
            CheckpointError: if a tensor is missing or breaks the format.
            RecipeError: if ARMOR_BACKEND names a backend that cannot run the experts.
        """
        self.factors.forget()
        loaded = {i: (_loaded(e.w13), _loaded(e.w2)) for i, e in sorted(self.experts.items())}
        self.experts.clear()
        backend = choose_backend()
        for name in self._names(layer):
            delattr(layer, name)
        sides = [side for pair in loaded.values() for side in pair]
        if not folds(backend, [piece for side in sides if not isinstance(side, Tensor) for piece in side]):
            self.running = {i: (_prepared(backend, up), _prepared(backend, down)) for i, (up, down) in loaded.items()}
            return
        biases = {name: getattr(layer, name).data for name in ("w13_bias", "w2_bias") if hasattr(layer, name)}
        super().create_weights(layer, **self.sizes)
        for index in list(loaded):
            for name, side in zip(("w13_weight", "w2_weight"), loaded.pop(index), strict=True):
                weight = side if isinstance(side, Tensor) else folded(side)
                getattr(layer, name).data[index, : weight.shape[0], : weight.shape[1]] = weight
        for name, bias in biases.items():
            getattr(layer, name).data.copy_(bias)
        super().process_weights_after_loading(layer)

    def apply(
        self,
        layer: Any,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """Compute `(T, H)` from x `(T, H)`, the sum over each token's experts `topk_ids` `(T, K)` by `topk_weights`."""
        if self.running is None:
            y: Tensor = super().apply(layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input)
            return y
        total = torch.zeros_like(x, dtype=torch.float32)
        for index, tokens, weights in _routed(layer, topk_weights, topk_ids):
            inputs = x[tokens] * weights.to(x.dtype) if layer.apply_router_weight_on_input else x[tokens]
            output = self._run(layer, index, inputs).float()
            total.index_add_(0, tokens, output if layer.apply_router_weight_on_input else output * weights)
        return total.to(x.dtype)

    def _run(self, layer: Any, index: int, x: Tensor) -> Tensor:
        assert self.running is not None
        (up, down), bias = self.running[index], self.moe.has_bias
        hidden = up.run(x, layer.w13_bias[index] if bias else None).contiguous()
        width = hidden.shape[-1] // 2 if self.moe.is_act_and_mul else hidden.shape[-1]
        activated = apply_moe_activation(layer.activation, hidden.new_empty(len(hidden), width), hidden)
        # Of a layer that is split by columns, the bias is added by one process alone.
        with_bias = bias and self.moe.tp_rank == 0
        return down.run(activated, layer.w2_bias[index] if with_bias else None)

    def _expert(self, layer: Any, index: int, dtype: torch.dtype) -> _Expert:
        names = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name]
        *first, down = [f"{self.prefix}.{index}.{name}" for name in names if name is not None]
        problem = group_problem({name: self.specs.get(name) for name in first})
        if problem is not None:
            raise CheckpointError(f"{problem}; {COMPRESS_AGAIN}")
        ways, rank = self.moe.tp_size, self.moe.tp_rank
        inner, outer = self.moe.intermediate_size_per_partition_unpadded, self.moe.hidden_dim_unpadded
        split = Share(inner * ways, ways, rank)
        return _Expert(
            self._side(first, [split] * len(first), Share(outer), dtype),
            self._side([down], [Share(outer)], split, dtype),
        )

    def _side(
        self, names: list[str], rows: list[Share], columns: Share, dtype: torch.dtype
    ) -> FusedLinear | PlainLinear:
        specs = {name: self.specs[name] for name in names if name in self.specs}
        if not specs:
            return PlainLinear(names, rows, columns, dtype)
        return FusedLinear(lay_out(specs, rows, columns), self.factors, dtype)

    def _names(self, layer: Any) -> list[str]:
        return [name for name in layer._parameters if name.startswith(("w13_", "w2_")) and not name.endswith("_bias")]

    def _register(self, layer: Any) -> None:
        """Parameters of the names that vLLM looks for, empty: each has a loader that knows where its tensors go."""
        wanted = {
            f"{side}_{tensor}": tensor
            for expert in self.experts.values()
            for side, fused in (("w13", expert.w13), ("w2", expert.w2))
            for tensor in (fused.tensors if isinstance(fused, FusedLinear) else (VALUES,))
        }
        for name, tensor in wanted.items():
            parameter = nn.Parameter(torch.empty(0), requires_grad=False)
            parameter.weight_loader = partial(self._load, layer, tensor)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def _register_biases(self, layer: Any, dtype: torch.dtype, attributes: Mapping[str, Any]) -> None:
        rows = {
            "w13": self.sizes["intermediate_size_per_partition"] * (2 if self.moe.is_act_and_mul else 1),
            "w2": self.sizes["hidden_size"],
        }
        for side, count in rows.items():
            parameter = nn.Parameter(torch.zeros(self.sizes["num_experts"], count, dtype=dtype), requires_grad=False)
            for key, value in attributes.items():
                setattr(parameter, key, value)
            layer.register_parameter(f"{side}_bias", parameter)

    def _load(
        self,
        layer: Any,
        tensor: str,
        param: nn.Parameter,  # noqa: ARG002 - vLLM hands it over; it is empty
        loaded_weight: Tensor,
        weight_name: str,  # noqa: ARG002 - theirs
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """What vLLM calls with each tensor that it reads; whether it is of an expert of this process, where it asks."""
        local = layer._map_global_expert_id_to_local_expert_id(expert_id)
        if local == -1:
            return False if return_success else None
        side, shard = _SHARDS[shard_id]
        layer_side: FusedLinear | PlainLinear = getattr(self.experts[local], side)
        layer_side.load(tensor, loaded_weight, shard)
        return True if return_success else None


def _loaded(side: FusedLinear | PlainLinear) -> list[Piece] | Tensor:
    return side.pieces() if isinstance(side, FusedLinear) else side.loaded()


def _prepared(backend: Backend, side: list[Piece] | Tensor) -> Prepared | Plain:
    return Plain(side) if isinstance(side, Tensor) else Prepared.of(backend, side)


def _routed(layer: Any, weights: Tensor, ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each expert of this process that a token reaches, in order: its number, the tokens, and their weights `(n, 1)`."""
    for expert in ids.unique().tolist():
        local = layer._map_global_expert_id_to_local_expert_id(int(expert)) if expert >= 0 else -1
        if local != -1:
            tokens, slots = (ids == expert).nonzero(as_tuple=True)
            yield local, tokens, weights[tokens, slots, None].float()
