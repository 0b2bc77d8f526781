"""transformers and compressed-tensors: read an ARMOR checkpoint with the stock loader, and write it again unchanged.

The stock quantizer of transformers, for every module that `quantization_config` targets, asks the compressor registered
under the group's format for the layout of the compressed module, on the meta device, and then fills it from the
checkpoint. `ArmorCompressor` is that compressor. One method of compressed-tensors is wrapped besides, see `register`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.compressors import BaseCompressor, ModelCompressor
from compressed_tensors.offload.module import unwrap_offload_forward
from compressed_tensors.quantization import QuantizationScheme, QuantizationStatus
from compressed_tensors.quantization.utils.helpers import is_module_quantized
from torch import Tensor, nn

from armor_recipes.checkpoint.config import (
    CORE_BITS,
    FORMAT,
    SCALE,
    TENSOR_NAMES,
    input_factors_of,
    layer_spec_of,
    named_tensors,
    quantization_config,
    tensor_names,
)
from armor_recipes.checkpoint.files import read_config, read_header, read_tensor
from armor_recipes.checkpoint.legacy import is_legacy, open_legacy
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.reader import check_folder
from armor_recipes.errors import ArmorError, CheckpointError
from armor_recipes.runtime.backends import choose_backend
from armor_recipes.runtime.linear import ArmorLinear

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ArmorCompressor(BaseCompressor):  # type: ignore[misc]
    """The layout of an ARMOR layer, for compressed-tensors' registry. It decompresses; only a recipe compresses."""

    @classmethod
    def compression_param_names(cls, scheme: QuantizationScheme) -> tuple[str, ...]:
        """Name a layer's tensors, bias aside."""
        bits = None if scheme.weights is None else scheme.weights.num_bits
        return tensor_names(next((core for core, wanted in CORE_BITS.items() if wanted == bits), "float"))

    @classmethod
    def can_compress(cls, module_type: type, scheme: QuantizationScheme) -> bool:  # noqa: ARG003 - theirs
        """Refuse always, so that the format is never inferred: configs name it."""
        return False

    @classmethod
    def decompress(
        cls,
        state_dict: dict[str, Tensor],
        scheme: QuantizationScheme,  # noqa: ARG003 - theirs
    ) -> dict[str, Tensor]:
        """Put the folded weight in the place of a layer's packed tensors; other entries (a bias) stay."""
        values, bitmask, a, b = (state_dict[name] for name in TENSOR_NAMES)
        packed = PackedLinear(values, bitmask, a, b, state_dict.get(SCALE))
        rest = {name: tensor for name, tensor in state_dict.items() if name not in (*TENSOR_NAMES, SCALE)}
        return {**rest, "weight": packed.fold(packed.dtype)}

    @classmethod
    def compress_module(cls, module: nn.Module) -> None:
        """Turn a linear layer on the meta device into an empty `ArmorLinear`, for the loader to fill.

        Raises:
            CheckpointError: if the module holds a weight (it would have to be factorised, which only a recipe does), is
                no linear layer, or does not fit the block size.
        """
        if isinstance(module, ArmorLinear):
            return
        if not isinstance(module, nn.Linear) or not module.weight.is_meta:
            raise CheckpointError(
                f"{type(module).__name__} cannot be compressed to {FORMAT}: ARMOR layers are made from linear "
                "layers by a recipe (`armor-apply`), and those of a checkpoint are laid out on the meta device"
            )
        _forget_quantization(module)
        scheme: Any = module.quantization_scheme
        ArmorLinear.adopt(module, layer_spec_of(scheme.weights.model_dump(mode="json"), where="quantization_config"))
        module.quantization_status = QuantizationStatus.COMPRESSED

    @classmethod
    def decompress_module(cls, module: nn.Module, leave_decompressed: bool = True) -> None:
        """Turn an `ArmorLinear` into a plain linear layer that holds the folded weight."""
        if isinstance(module, ArmorLinear):
            with unwrap_offload_forward(module):  # decompress_model has wrapped forward to move tensors between devices
                module.to_dense().__dict__.pop("forward", None)
        if leave_decompressed:
            module.quantization_status = QuantizationStatus.DECOMPRESSED
        else:
            for name in ("quantization_scheme", "quantization_status"):
                module.__dict__.pop(name, None)


def register() -> None:
    """Make `from_pretrained` read ARMOR checkpoints. Importing this module does it; calling it again does nothing.

    Raises `ArmorError` if another package has taken the format's name.

    Besides the registration, `ModelCompressor.add_decompress_hook` is wrapped: the hook decompresses a model at its
    first forward pass, for lack of kernels, and marks its config `decompressed`, which a model saved later then says of
    itself. ARMOR layers run as they are, so where a model has no other compressed modules no hook is added. It is called once all
    modules of a model are laid out: the place where layers that share a B are joined, since a compressor sees one module, without
    its name.
    """
    if FORMAT in BaseCompressor.registered_names():
        _check_registered()
        return
    BaseCompressor.register_value(ArmorCompressor, name=FORMAT)
    ModelCompressor.add_decompress_hook = _unless_all_armor(ModelCompressor.add_decompress_hook)


def load(
    folder: str | Path,
    *,
    backend: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """Load a checkpoint that a recipe or `armor export` wrote, or a legacy 2:4 folder, checked, in evaluation mode.

    Unlike `from_pretrained` this checks names, shapes and dtypes of every ARMOR tensor against config.json first, then
    their contents, and accepts no format outside a fixed list; nothing that the checkpoint contains is executed.

    Args:
        folder: the checkpoint.
        backend: `auto`, `cpu`, `cuda`, `folded` or `reference`; None asks the environment (ARMOR_BACKEND), then takes `auto`.
        dtype: to compute in; `auto` is the stored one. Float32 holds every stored number exactly.
        device: to move the model to.

    Raises:
        CheckpointError: if the folder is not what its format promises.
        RecipeError: if the backend is unknown.
    """
    chosen = choose_backend(backend)
    check_folder(Path(folder))
    try:
        model = _loaded(Path(folder), dtype)
    except (ArmorError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a wrong value in config.json raises whatever the architecture's code meets first
        raise CheckpointError(f"{folder}: transformers cannot load this model: {error}") from error
    if device is not None:
        model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its signature
    for name, module in model.named_modules():
        if isinstance(module, ArmorLinear):
            module.label, module.backend = name, chosen.name
            module.prepare()
    return model


def _loaded(folder: Path, dtype: torch.dtype | str) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    load_class: Any = AutoModelForCausalLM
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(folder), "use_safetensors": True, **options}
    quantization = read_config(folder).get("quantization_config")
    if is_legacy(quantization):
        config = AutoConfig.from_pretrained(str(folder), **options)
        state, config.quantization_config = _legacy_state(folder, quantization)
        load_class = AutoModelForCausalLM._model_mapping[type(config)]
        source = {"pretrained_model_name_or_path": None, "config": config, "state_dict": state}
    model, info = load_class.from_pretrained(**source, dtype=dtype, output_loading_info=True)
    problems = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if problems:
        raise CheckpointError(
            f"{folder}: the tensors are not those of the model that config.json describes: {problems}"
        )
    loaded: PreTrainedModel = model
    return loaded


def _legacy_state(folder: Path, quantization: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a legacy folder under the names of ARMOR layers, and the `quantization_config` that goes with them."""
    tensors = read_header(folder)
    legacy = open_legacy(folder, quantization, tensors)
    layers = {name: legacy.read(name) for name in legacy.layers}
    of_layers = {f"{name}.{part}" for name in layers for part in legacy.parts}
    state = {name: read_tensor(tensors, name) for name in tensors if name not in of_layers}
    for name, layer in layers.items():
        state.update({f"{name}.{part}": tensor for part, tensor in named_tensors(layer).items()})
    return state, quantization_config(layers, [])


def _check_registered() -> None:
    other = BaseCompressor.get_value_from_registry(FORMAT)
    if other is not ArmorCompressor:
        raise ArmorError(
            f"compressed-tensors' format {FORMAT} is registered to {other.__module__}.{other.__qualname__} already: "
            "ARMOR checkpoints cannot be read in this process; armor_recipes needs compressed-tensors >= 0.17"
        )


def _forget_quantization(module: nn.Linear) -> None:
    """Remove what the stock quantizer attached for a dense weight: a forward that quantises, and its scales."""
    module.__dict__.pop("forward", None)
    for name in [*module._parameters, *module._buffers]:
        if name not in ("weight", "bias"):
            delattr(module, name)


def _join_sharers(model: nn.Module) -> None:
    """Let layers use the B of the module that their config group names. Raises `CheckpointError` where they cannot."""
    where = "quantization_config"
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ArmorLinear)}
    attached: Any = [getattr(layer, "quantization_scheme", None) for layer in layers.values()]
    for scheme in {id(scheme): scheme for scheme in attached if scheme is not None}.values():
        owners = input_factors_of(scheme.weights.model_dump(), targets=scheme.targets, where=where)
        for sharer, owner in owners.items():
            if sharer not in layers or owner not in layers:
                raise CheckpointError(
                    f"{where} lets {sharer} use the B of {owner}, and one of them is no ARMOR layer here"
                )
            layers[sharer].label, layers[owner].label = sharer, owner
            layers[sharer].share_input_factor(layers[owner])


def _unless_all_armor(add_hook: Callable[..., None]) -> Callable[..., None]:
    @wraps(add_hook)
    def add_decompress_hook(self: Any, model: nn.Module) -> None:
        _join_sharers(model)
        quantized = [module for module in model.modules() if is_module_quantized(module)]
        if not quantized or not all(isinstance(module, ArmorLinear) for module in quantized):
            add_hook(self, model)

    return add_decompress_hook


register()
