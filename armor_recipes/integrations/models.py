"""Models and tokenizers named by a recipe, loaded through transformers."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from armor_recipes import builtin
from armor_recipes.errors import InputError, PlanError
from armor_recipes.recipe.schema import ModelSpec

BUILTIN_PREFIX = "builtin:"
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a recipe's model comes from, its configuration, and the dtypes to store and compute in."""

    location: str
    revision: str | None
    config: PretrainedConfig
    stored_dtype: torch.dtype
    compute_dtype: torch.dtype

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a hub id."""
        path = Path(self.location)
        return path if path.is_dir() else None


def open_model(spec: ModelSpec, *, device: torch.device, compressed: bool = False) -> ModelSource:
    """Read a model's configuration, no weights.

    Raises InputError where it cannot be read, and PlanError where it is quantised or compressed but not `compressed` is said.
    """
    location = spec.id
    if location.startswith(BUILTIN_PREFIX):
        location = str(builtin.model_folder(location.removeprefix(BUILTIN_PREFIX)))
    if spec.revision is not None and Path(location).is_dir():
        raise InputError(
            f"model {spec.id} is a local folder, which has no revision {spec.revision!r}; remove `revision`"
        )
    try:
        config = AutoConfig.from_pretrained(location, revision=spec.revision, trust_remote_code=False)
    except Exception as error:  # transformers' own validation errors share no base class
        raise InputError(_unreadable(spec.id, error)) from error
    if getattr(config, "quantization_config", None) is not None and not compressed:
        raise PlanError(f"model {spec.id} is already quantised or compressed; give the dense model it was made from")
    stored = _DTYPES.get(spec.dtype) or getattr(config, "dtype", None) or _written_dtype(Path(location))
    if spec.compute_dtype != "auto":
        compute = _DTYPES[spec.compute_dtype]
    else:
        compute = torch.float32 if device.type == "cpu" else stored
    return ModelSource(location, spec.revision, config, stored, compute)


def _written_dtype(folder: Path) -> torch.dtype:
    """The floating dtype of most numbers in a folder's safetensors files, for a config.json that names none; else float32."""
    counts: Counter[str] = Counter()
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - no mapping
                part = tensors.get_slice(name)
                counts[part.get_dtype()] += prod(part.get_shape())
    known = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    return next((known[name] for name, _ in counts.most_common() if name in known), torch.float32)


def meta_model(source: ModelSource) -> PreTrainedModel:
    """The model on the meta device: names and shapes without a byte of weights.

    Raises PlanError for what is no decoder-only language model, InputError where the configuration makes no model.
    """
    name = type(source.config).__name__
    if getattr(source.config, "is_encoder_decoder", False):
        raise PlanError(
            f"model {source.location} ({name}) has an encoder; only decoder-only language models are supported"
        )
    if type(source.config) not in AutoModelForCausalLM._model_mapping:
        raise PlanError(
            f"model {source.location} ({name}) is no causal language model that transformers knows; give one"
        )
    try:
        with torch.device("meta"):
            return _from_config(source.config)
    except Exception as error:  # a wrong value in config.json raises whatever the architecture's code meets first
        raise InputError(_unreadable(source.location, error)) from error


def load_model(source: ModelSource, *, device: torch.device) -> PreTrainedModel:
    """The model in its compute dtype on `device`, in evaluation mode. Raises InputError where weights are missing or unreadable.

    Its numbers are those of the stored dtype, see `rounded`.
    """
    model = load_dense(source.location, dtype=source.compute_dtype, device=device, revision=source.revision)
    return rounded(model, source.stored_dtype)


def rounded(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """The same model with everything that is saved rounded in place to `dtype`, so that computing starts from what is stored.

    (Casting to the stored dtype and back would round the rotary frequencies too, which no later loader does.) Raises
    InputError for numbers that do not fit.
    """
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not tensor.is_floating_point() or tensor.dtype == dtype:
                continue
            cast = tensor.to(dtype)
            lost = int((cast.isfinite() != tensor.isfinite()).sum())
            if lost:
                raise InputError(f"{lost} numbers of {name} do not fit {dtype}: set model.dtype to bfloat16 or float32")
            tensor.copy_(cast)
    return model


def load_dense(
    location: str, *, dtype: torch.dtype, device: torch.device, revision: str | None = None
) -> PreTrainedModel:
    """A stock model from a folder or hub id, in evaluation mode. Raises InputError where weights are missing or unreadable."""
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False, "dtype": dtype}
    load: Any = AutoModelForCausalLM.from_pretrained
    try:
        # Weights of the wrong shape are told by `info`, with their names, which transformers' own error leaves out.
        model, info = load(location, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(_unreadable(location, error)) from error
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info.get(kind)}
    if problems:
        raise InputError(f"the weights of {location} do not fit its config.json: {problems}")
    module: nn.Module = model
    module.to(device=device).eval()
    loaded: PreTrainedModel = model
    return loaded


def moved(model: PreTrainedModel, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The same model, moved in place, in evaluation mode.

    Only what is saved is cast: `model.to(dtype)` would round the rotary frequencies too, which no later loader does.
    """
    module: nn.Module = model
    module.to(device=device).eval()
    for tensor in module.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def load_tokenizer(source: ModelSource) -> Any | None:
    """The model's tokenizer, or None where its folder or repository has none (generated models)."""
    folder = source.folder
    if folder is not None and not any(folder.glob("tokenizer*")) and not any(folder.glob("*.model")):
        return None
    try:
        return AutoTokenizer.from_pretrained(source.location, revision=source.revision, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise InputError(f"the tokenizer of {source.location} cannot be read: {error}") from error


def _from_config(config: PretrainedConfig) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    assert isinstance(model, PreTrainedModel)
    model.tie_weights()
    return model


def _unreadable(name: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return (
        f"model {name!r} cannot be read ({type(error).__name__}: {reason}); give a folder with a config.json, "
        f"a hub id that this machine can reach, or builtin:NAME"
    )
