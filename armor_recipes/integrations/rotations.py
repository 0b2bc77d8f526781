"""Rotations of activations, queries and keys that a model makes as it runs: QuIP's, and SpinQuant's R3 and R4.

llm-compressor writes them as `transform_config` and as tensors beside the weights, which are rotated to match. Transformers reads
neither, and loads another model without a word; vLLM makes Hadamard ones. compressed-tensors' own transforms are applied here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from armor_recipes.checkpoint.config import ROTATIONS, rotations_of
from armor_recipes.checkpoint.files import read_config
from armor_recipes.errors import CheckpointError
from armor_recipes.model.cache import through_cache

#: The argument by which compressed-tensors' hook of keys gives attention its cache; transformers 5.24 has another name for it.
_KNOWN_CACHE = "past_key_values"


def run_rotations(model: Any, files: Sequence[str | Path]) -> None:
    """Let a loaded model rotate as it runs what its `config.json`, beside the files with its tensors, says; else leave it.

    Raises:
        CheckpointError: where a rotation's tensor is missing or has another shape, or compressed-tensors makes no such rotation.
    """
    quantization = read_config(Path(files[0]).parent).get("quantization_config") if files else None
    groups = rotations_of(quantization)
    if not groups or not isinstance(quantization, Mapping):
        return
    from compressed_tensors import TRANSFORM_CONFIG_NAME
    from compressed_tensors.transform import TransformConfig, TransformFactory, apply

    try:
        for name, scheme in TransformConfig.model_validate({"config_groups": groups}).config_groups.items():
            TransformFactory.from_scheme(scheme, name=name).apply_to_model(model, use_tqdm=False)
        config = TransformConfig.model_validate(quantization[ROTATIONS])
    except (ValueError, KeyError, NotImplementedError) as error:
        raise CheckpointError(
            f"config.json: compressed-tensors cannot make the rotations of {ROTATIONS}: {error}"
        ) from error
    _rotate_keys(model, groups)
    _fill(model, files)
    tie: Any = getattr(
        apply, "_register_tied_transform_weights", None
    )  # older releases save shared ones again and again
    if tie is not None:
        tie(model)
    setattr(model, TRANSFORM_CONFIG_NAME, config)
    model.config.quantization_config = dict(
        quantization
    )  # the loader's own leaves rotations out, where the model is saved


def rotation_tensors(model: nn.Module) -> set[str]:
    """Full names of the tensors of all rotations that a model makes as it runs; several may be one tensor."""
    from compressed_tensors.transform.factory.base import TransformBase

    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, TransformBase)]
    return {f"{name}.{key}" for name, part in parts for key, _ in part.named_parameters(recurse=False)}


def _rotate_keys(model: nn.Module, groups: Iterable[str]) -> None:
    """Rotate keys on their way into the cache where compressed-tensors' own hook does not find it."""
    for module in model.modules():
        for rotation in [part for name in groups if (part := getattr(module, f"{name}_k_cache", None)) is not None]:
            if _KNOWN_CACHE not in inspect.signature(type(module).forward).parameters:
                module.register_forward_pre_hook(through_cache(module, partial(_rotated, rotation)), with_kwargs=True)


def _rotated(rotation: nn.Module, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return rotation(keys), values


@torch.no_grad()
def _fill(model: nn.Module, files: Iterable[str | Path]) -> None:
    """Put the tensors of the files into the rotations. Those that are one in the model lie in the files once, under one's name."""
    names = rotation_tensors(model)
    left: dict[int, str] = {}
    for name in sorted(names):
        left.setdefault(id(model.get_parameter(name)), name)
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in sorted(names.intersection(opened.keys())):
                value, parameter = opened.get_tensor(name), model.get_parameter(name)
                if value.shape != parameter.shape:
                    raise CheckpointError(
                        f"{file}: {name} is {tuple(value.shape)}, and the rotation of {ROTATIONS} {tuple(parameter.shape)}"
                    )
                parameter.copy_(value)
                parameter.requires_grad_(False)
                left.pop(id(parameter), None)
    if left:
        raise CheckpointError(
            f"{ROTATIONS} in config.json asks for rotations whose tensors are in no file ({', '.join(left.values())}): the folder "
            "is not whole"
        )
