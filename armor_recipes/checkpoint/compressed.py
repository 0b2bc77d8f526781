"""A compressed model as a recipe's input: what its folder holds packed or quantised, from config.json and headers alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armor_recipes.checkpoint.config import QUANT_METHOD, LayerSpec, layer_specs
from armor_recipes.checkpoint.files import CONFIG_FILE, MANIFEST_FILE, read_config, read_header
from armor_recipes.checkpoint.header import shown
from armor_recipes.checkpoint.legacy import is_legacy, open_legacy
from armor_recipes.checkpoint.quantized import Scheme
from armor_recipes.checkpoint.reader import BIAS, check_folder, checked_layers, plain_layers
from armor_recipes.errors import PlanError


@dataclass(frozen=True, slots=True)
class CompressedModel:
    """The layers of a model's folder that are not dense.

    Attributes:
        folder: where it lies.
        layers: ARMOR layers by full module name, legacy ones among them.
        plain: what plain layers are quantised to, by full module name.
        nbytes: bytes of their tensors in the folder, biases aside.
        ours: whether this package wrote it. Then what a recipe does not change stays as it is stored; of other folders the plain
            layers are decompressed, and the model is a dense one from there on.
    """

    folder: Path
    layers: Mapping[str, LayerSpec]
    plain: Mapping[str, Scheme]
    nbytes: Mapping[str, int]
    ours: bool

    @property
    def kept(self) -> Mapping[str, Scheme]:
        """Plain layers that stay as they are stored."""
        return self.plain if self.ours else {}

    @property
    def decompressed(self) -> Mapping[str, Scheme]:
        """Plain layers that become dense."""
        return {} if self.ours else self.plain

    def without_own(self, tensors: Collection[str]) -> list[str]:
        """Those of the folder's tensors that are no part of such a layer, biases aside."""
        names = self.layers.keys() | self.plain.keys()
        parts = (tensor.rpartition(".") for tensor in tensors)
        return [f"{name}{dot}{part}" for name, dot, part in parts if name not in names or part == BIAS]


def open_compressed(folder: Path) -> CompressedModel:
    """Read what is packed or quantised in a model's folder.

    Raises:
        PlanError: where something of it has no place in a recipe's model, with what to do.
        CheckpointError: where the folder is damaged.
    """
    config = read_config(folder)
    quantization = config.get("quantization_config")
    check_readable(quantization, str(folder))
    check_folder(folder)
    tensors = read_header(folder)
    if is_legacy(quantization):
        legacy = open_legacy(folder, quantization, tensors)
        specs = {name: layer.spec for name, layer in legacy.layers.items()}
        return CompressedModel(folder, specs, {}, {}, ours=True)
    every = layer_specs(quantization, where=str(folder / CONFIG_FILE))
    tied = next((name for name, spec in every.items() if spec.tied_to is not None), None)
    if tied is not None:
        raise PlanError(
            f"model {folder}: the packed weight of {tied} is that of another module, too, which a recipe does not take up again: "
            "give the dense model that it was made from"
        )
    layers, plain = checked_layers(folder, quantization, tensors), plain_layers(folder, quantization, tensors)
    nbytes = dict.fromkeys(plain, 0)
    for tensor, info in tensors.items():
        name, _, part = tensor.rpartition(".")
        if name in plain and part != BIAS:
            nbytes[name] += info.nbytes
    return CompressedModel(folder, layers, plain, nbytes, ours=bool(layers) or (folder / MANIFEST_FILE).exists())


def check_readable(quantization: Any, model: str) -> None:
    """Raise PlanError for a `quantization_config` of another method, or with more than weights and activations in it."""
    found = quantization if isinstance(quantization, Mapping) else {}
    method = found.get("quant_method")
    if method != QUANT_METHOD:
        raise PlanError(
            f"model {model} is quantised by {shown(method)}, and a recipe takes dense models and those of {QUANT_METHOD}: give the "
            "dense model that it was made from"
        )
    for key, what in (("kv_cache_scheme", "a quantised cache of keys and values"), ("transform_config", "transforms")):
        if found.get(key):
            raise PlanError(
                f"model {model} has {what} ({key} in its config.json), which a recipe would lose: give the dense model that it was "
                "made from"
            )
