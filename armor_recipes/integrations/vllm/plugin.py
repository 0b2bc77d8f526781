"""vLLM's side: the config class that claims ARMOR checkpoints, and the method that its linear layers are made and run by.

Importing this module registers both. It is imported by vLLM alone, through `armor_recipes.integrations.vllm.register`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import vllm.envs
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    QKVParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from armor_recipes.checkpoint.config import FORMAT, QUANT_METHOD, VALUES, LayerSpec, layer_specs
from armor_recipes.checkpoint.legacy import is_legacy
from armor_recipes.checkpoint.packing import PACKABLE_DTYPES
from armor_recipes.checkpoint.reader import check_folder
from armor_recipes.checkpoint.serving import group_problem
from armor_recipes.errors import CheckpointError
from armor_recipes.integrations.vllm.experts import ArmorExpertsMethod
from armor_recipes.integrations.vllm.names import take_our_names
from armor_recipes.integrations.vllm.parts import COMPRESS_AGAIN, FusedLinear, InputFactors, Share, lay_out
from armor_recipes.integrations.vllm.running import Prepared, folded, folds
from armor_recipes.runtime.backends import BACKEND_VARIABLE, choose_backend
from armor_recipes.runtime.kernel import kernel_available

NAME = "armor"


@register_quantization_config(NAME)
class ArmorConfig(QuantizationConfig):  # type: ignore[misc]
    """What config.json says of the packed layers of a checkpoint; takes every folder whose format is ours, without a flag."""

    def __init__(self, specs: Mapping[str, LayerSpec]) -> None:
        super().__init__()
        self.specs = dict(specs)
        self.factors = InputFactors()
        self.architectures: tuple[str, ...] = ()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """In another of the server's processes, whose classes know none of our names yet."""
        self.__dict__.update(state)
        take_our_names(self.architectures)

    def get_name(self) -> str:
        """The name by which vLLM registers the method."""
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Dtypes that a server may compute in."""
        return list(PACKABLE_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        """Any: on a GPU layers run folded."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in config.json."""
        return []

    @classmethod
    def override_quantization_method(
        cls,
        hf_quant_cfg: Mapping[str, Any],
        user_quant: str | None,  # noqa: ARG003 - theirs
        hf_config: Any = None,  # noqa: ARG003 - theirs
    ) -> str | None:
        """Claim the formats that this package writes, of which vLLM's own reader of compressed-tensors knows none."""
        sparsity = hf_quant_cfg.get("sparsity_config")
        formats = hf_quant_cfg.get("format"), sparsity.get("format") if isinstance(sparsity, Mapping) else None
        return NAME if hf_quant_cfg.get("quant_method") == QUANT_METHOD and FORMAT in formats else None

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> ArmorConfig:
        """Read a `quantization_config`.

        Raises:
            CheckpointError: where it is not ours, or the legacy one, or several layers have one weight.
        """
        if is_legacy(config):
            raise CheckpointError(
                "config.json: a legacy folder of plain 2:4 (`sparsity_config`) is not served; serve what `armor "
                "export FOLDER OUT --to dense-2of4` makes of it"
            )
        specs = layer_specs(config, where="config.json")
        tied = next((name for name, spec in specs.items() if spec.tied_to is not None), None)
        if tied is not None:
            raise CheckpointError(
                f"config.json: {tied} has the weight of {specs[tied].tied_to}, and vLLM makes such layers once, under a name that "
                "no checkpoint has; serve what `armor export FOLDER OUT --to dense` makes of it"
            )
        return cls(specs)

    def maybe_update_config(
        self,
        model_name: str,
        hf_config: Any = None,
        revision: str | None = None,  # noqa: ARG002 - theirs
    ) -> None:
        """Check a local folder's headers against its config before anything is built. Raises `CheckpointError`."""
        self.architectures = () if hf_config is None else tuple(hf_config.architectures or ())
        take_our_names(self.architectures)
        if Path(model_name).is_dir():
            check_folder(Path(model_name))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take over the names that vLLM gives to the modules of some models."""

        def renamed(name: str) -> str:
            weight = next(iter(hf_to_vllm_mapper.apply_list([f"{name}.{VALUES}"])), f"{name}.{VALUES}")
            return str(weight).removesuffix(f".{VALUES}")

        self.specs = {
            renamed(name): replace(spec, input_factor=spec.input_factor and renamed(spec.input_factor))
            for name, spec in self.specs.items()
        }

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method of a layer: ours where config.json names its modules, vLLM's own where it names none.

        Raises:
            CheckpointError: for modules that cannot run as one layer, and for packed modules in what is no linear layer.
        """
        if isinstance(layer, LinearBase):
            members = self._members(prefix)
            return ArmorLinearMethod(self.factors, members) if members else UnquantizedLinearMethod()
        packed = next((name for name in self.specs if name == prefix or name.startswith(f"{prefix}.")), None)
        if packed is not None and isinstance(layer, RoutedExperts):
            return ArmorExpertsMethod(layer.moe_config, self.factors, self.specs, prefix)
        if packed is not None:
            raise CheckpointError(
                f"{packed} is packed, and vLLM runs it in a {type(layer).__name__}: only linear layers and experts are served "
                "packed, not embeddings or the output layer; add it to `ignore` in the recipe, or serve what `armor export FOLDER "
                "OUT --to dense` makes of it"
            )
        return None

    def _members(self, prefix: str) -> dict[str, LayerSpec]:
        """The packed modules that the layer is made of, by their names in the checkpoint; empty where all are dense."""
        if prefix in self.specs:
            return {prefix: self.specs[prefix]}
        parent, _, last = prefix.rpartition(".")
        names = [f"{parent}.{member}" for member in self.packed_modules_mapping.get(last, ())]
        found = {name: self.specs.get(name) for name in names}
        if not any(found.values()):
            return {}
        problem = group_problem(found)
        if problem is not None:
            raise CheckpointError(f"{problem}; {COMPRESS_AGAIN}")
        return {name: spec for name, spec in found.items() if spec is not None}


class ArmorLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Makes, loads and runs one linear layer of vLLM, which stands for one module of the checkpoint or several.

    On a CPU it runs by the backend that ARMOR_BACKEND names, `auto` without it; where that would fold, and on a GPU, the
    folded weight is handed to vLLM's own method, and the packed tensors are freed.
    """

    def __init__(self, factors: InputFactors, members: Mapping[str, LayerSpec]) -> None:
        self.factors = factors
        self.members = dict(members)
        self.dense = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,  # noqa: ARG002 - vLLM's loader, which does not know blocks
    ) -> None:
        """Register the packed tensors, empty, each with a loader of its own.

        Raises:
            CheckpointError: where tensor parallelism would cut a block.
        """
        ways = output_size // sum(output_partition_sizes)
        columns = Share(input_size, input_size // input_size_per_partition)
        if columns.ways > 1:
            columns = replace(columns, index=layer.tp_rank)
        rows = [_rows(layer, index, count, ways) for index, count in enumerate(output_partition_sizes)]
        fused = FusedLinear(lay_out(self.members, rows, columns), self.factors, params_dtype)
        for name, parameter in fused.tensors.items():
            parameter.weight_loader = partial(_load, fused, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)
        layer.armor_parts = fused

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check what was loaded, and let the backend prepare what it runs from.

        Raises:
            CheckpointError: if a tensor is missing or breaks the format.
            RecipeError: if ARMOR_BACKEND names a backend that cannot run the layer.
        """
        self.factors.forget()
        fused: FusedLinear = layer.__dict__.pop("armor_parts")
        pieces, backend = fused.pieces(), choose_backend()
        if folds(backend, pieces):
            weight = folded(pieces)
            for name in list(fused.tensors):
                delattr(layer, name)
                del fused.tensors[name]  # which refers to `fused` by its loader
            layer.weight = nn.Parameter(weight, requires_grad=False)
            self.dense.process_weights_after_loading(layer)
            return
        layer.armor = Prepared.of(backend, pieces)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute `(..., O)` of this process from x `(..., I)`; of a layer split by columns, its part of the sum."""
        prepared: Prepared | None = getattr(layer, "armor", None)
        y: Tensor = self.dense.apply(layer, x, bias) if prepared is None else prepared.run(x, bias)
        return y


def _rows(layer: Any, index: int, count: int, ways: int) -> Share:
    """The rows of one module that this process holds, `count` of them; several processes may hold the same key-value heads."""
    if ways == 1:
        return Share(count)
    replicas = layer.num_kv_head_replicas if isinstance(layer, QKVParallelLinear) and index else 1
    return Share(count * ways // replicas, ways // replicas, layer.tp_rank // replicas)


def _load(
    fused: FusedLinear,
    name: str,
    parameter: nn.Parameter,  # noqa: ARG001 - vLLM hands it over; the layer has it
    loaded: Tensor,
    shard: object = None,
) -> None:
    """What vLLM calls with each tensor that it reads."""
    fused.load(name, loaded, shard)


# vLLM keeps compiled models by the variables it knows; what the graph of a layer is depends on these two things besides.
vllm.envs.environment_variables[BACKEND_VARIABLE] = lambda: (os.environ.get(BACKEND_VARIABLE), kernel_available())
