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
from torch import Tensor, nn

from armor_recipes.checkpoint.config import (
    BLOCK_SIZE_KEY,
    CORE_BITS,
    FORMAT,
    SCALE,
    TENSOR_NAMES,
    cache_of,
    input_factors_of,
    layer_spec_of,
    named_tensors,
    quantization_config,
    tensor_names,
    tied_weights_of,
)
from armor_recipes.checkpoint.files import MANIFEST_FILE, read_config, read_header, read_tensor
from armor_recipes.checkpoint.header import read_json
from armor_recipes.checkpoint.legacy import is_legacy, open_legacy
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.reader import check_folder, read_caches
from armor_recipes.compute import plain_torch
from armor_recipes.errors import ArmorError, CheckpointError, PlanError
from armor_recipes.integrations.attention import adopt_attention
from armor_recipes.integrations.caches import run_caches, without_cache
from armor_recipes.integrations.loading import tie_packed, wrap_quantizer
from armor_recipes.integrations.plain import PlainLinear, lay_out_zero_point, run_plain
from armor_recipes.integrations.rotations import rotation_tensors
from armor_recipes.integrations.upstream import (
    VERSIONS,
    BaseCompressor,
    HfQuantizer,
    ModelCompressor,
    QuantizationScheme,
    QuantizationStatus,
    is_module_quantized,
    release,
    unwrap_offload_forward,
)
from armor_recipes.paths import user_path
from armor_recipes.runtime.backends import choose_backend
from armor_recipes.runtime.dense import DenseLinear, adopt_dense
from armor_recipes.runtime.linear import ArmorLinear
from armor_recipes.runtime.pages import read_each_token, to_large_pages
from armor_recipes.runtime.slower import warn_where_slower

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WRAPPED = "_wrapped_by_armor_recipes"


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
        weights, activations = (
            None if args is None else args.model_dump(mode="json")
            for args in (scheme.weights, scheme.input_activations)
        )
        ArmorLinear.adopt(module, layer_spec_of(weights, activations, where="quantization_config"))
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

    If another package has the format's name, or takes it later, it is theirs, and reading an ARMOR checkpoint is an error, see
    `check_registered`.

    Besides the registration, `ModelCompressor.add_decompress_hook` is wrapped: the hook decompresses a model at its
    first forward pass, for lack of kernels, and marks its config `decompressed`, which a model saved later then says of
    itself. ARMOR layers run as they are, so where a model has no other compressed modules no hook is added. It is called once all
    modules of a model are laid out: the place where layers that share a B or a weight are joined, since a compressor sees one
    module, without its name.
    """
    if getattr(_registered(), "__module__", None) == __name__:  # as it was before this module was reloaded
        release(FORMAT)
    if _registered() is None:
        BaseCompressor.register_value(ArmorCompressor, name=FORMAT)
    if hasattr(ModelCompressor, _WRAPPED):
        return
    wrap_quantizer(HfQuantizer)
    setattr(ModelCompressor, _WRAPPED, True)
    BaseCompressor.register_value = classmethod(_gives_way(BaseCompressor.register_value.__func__))
    ModelCompressor.compress_model = _checked(ModelCompressor.compress_model)
    ModelCompressor.add_decompress_hook = _unless_all_armor(ModelCompressor.add_decompress_hook)


def check_registered() -> None:
    """Raise `ArmorError` if the format's name is another package's in this process."""
    other = _registered()
    if other is not ArmorCompressor:
        whose = "not registered" if other is None else f"registered to {other.__module__}.{other.__qualname__}"
        raise ArmorError(
            f"compressed-tensors' format {FORMAT} is {whose}, not to armor_recipes: ARMOR checkpoints cannot be read in this "
            f"process; use a compressed-tensors{VERSIONS}, and no other package that registers this format"
        )


@plain_torch()
def load(
    folder: str | Path,
    *,
    backend: str | None = None,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    attention: str | dict[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a checkpoint that a recipe or `armor export` wrote, or a legacy 2:4 folder, checked, in evaluation mode.

    With `auto` and `cpu` weights that each token reads are copied from the mapped file into large pages, where the system has them.
    One warning names how many ARMOR layers are slower on this CPU than dense ones, where that can be felt.

    Unlike `from_pretrained` this checks names, shapes and dtypes of every ARMOR tensor against config.json first, then
    their contents, and accepts no format outside a fixed list; nothing that the checkpoint contains is executed.

    Args:
        folder: the checkpoint.
        backend: `auto`, `cpu`, `cuda`, `folded` or `reference`; None asks the environment (ARMOR_BACKEND), then takes `auto`.
        dtype: to compute in; `auto` is the stored one. Float32 holds every stored number exactly.
        device: to move the model to.
        attention: the attention implementation (`eager`, `sdpa`, …), or a dict of them by the parts of a composite config; None is
            transformers' choice.

    Raises:
        CheckpointError: if the folder is not what its format promises.
        RecipeError: if the backend is unknown.
        ArmorError: if compressed-tensors knows the format as another package's.
    """
    from armor_recipes.integrations.models import ADAPTER_FILE, own_memory  # imports much of transformers

    chosen, folder = choose_backend(backend), user_path(folder)
    check_folder(folder)
    if (folder / ADAPTER_FILE).exists():
        raise CheckpointError(
            f"{folder} holds a PEFT adapter beside the model ({ADAPTER_FILE}): move its files to a folder of their own, and "
            "load it onto the model with peft"
        )
    try:
        model = _loaded(folder, dtype, attention)
    except (ArmorError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a wrong value in config.json raises whatever the architecture's code meets first
        raise CheckpointError(f"{folder}: transformers cannot load this model: {error}") from error
    own_memory(model, mapped={id(module.weight) for module in model.modules() if isinstance(module, ArmorLinear)})
    ours = chosen.name in ("auto", "cpu")
    run_plain(model, model.dtype, kernel=ours)
    if device is not None:
        model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its signature
    if ours:
        adopt_dense(model)
        adopt_attention(model)
        to_large_pages(read_each_token(model, (ArmorLinear, DenseLinear, PlainLinear)))
    layers = {name: module for name, module in model.named_modules() if isinstance(module, ArmorLinear)}
    for name, layer in layers.items():
        layer.label, layer.backend = name, chosen.name
        layer.prepare()
    warn_where_slower(layers)
    return model


def _loaded(folder: Path, dtype: torch.dtype | str, attention: str | dict[str, Any] | None) -> PreTrainedModel:
    from transformers import AutoConfig

    from armor_recipes.integrations.classes import class_of
    from armor_recipes.integrations.models import attention_option

    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    # `return_dict`, whatever config.json says: outputs are read by name.
    config = AutoConfig.from_pretrained(str(folder), return_dict=True, **options)
    try:
        load_class: Any = class_of(config, str(folder))
    except PlanError as error:
        raise CheckpointError(str(error)) from error
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(folder), "use_safetensors": True, **options}
    quantization, caches = read_config(folder).get("quantization_config"), read_caches(folder)
    scheme = cache_of(quantization, where=str(folder))
    if scheme is not None:
        without_cache(config)
    if is_legacy(quantization):
        state, config.quantization_config = _legacy_state(folder, quantization)
        source = {"pretrained_model_name_or_path": None, "state_dict": state}
    source |= {"config": config, "dtype": dtype, "output_loading_info": True, **attention_option(attention)}
    model, info = load_class.from_pretrained(**source)
    carried = _carried_over(folder) | rotation_tensors(model)
    carried |= {f"{name}.{part}" for name, cache in caches.items() for part in cache.tensors}
    left = {
        kind: {str(n) for n in names} - (carried if kind == "unexpected_keys" else set())
        for kind, names in info.items()
    }
    problems = {kind: sorted(names) for kind, names in left.items() if names}
    if problems:
        raise CheckpointError(
            f"{folder}: the tensors are not those of the model that config.json describes: {problems}"
        )
    loaded: PreTrainedModel = model
    if scheme is not None:
        run_caches(loaded, quantization or {}, scheme, caches)
    return loaded


def _carried_over(folder: Path) -> set[str]:
    """Tensors of no module, which the manifest lists because the dense model's files held them, too."""
    manifest = folder / MANIFEST_FILE
    listed = read_json(manifest).get("carried_over") if manifest.exists() else None
    return {name for name in listed if isinstance(name, str)} if isinstance(listed, list) else set()


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


def _registered() -> Any:
    """What the format's name means to compressed-tensors now, None if nothing."""
    try:
        return BaseCompressor.get_value_from_registry(FORMAT)
    except KeyError:
        return None


def _gives_way(register_value: Callable[..., None]) -> Callable[..., None]:
    """Registering the format's name for somebody else after us would fail as they are imported: let them have it."""

    @wraps(register_value)
    def registered(cls: Any, value: Any, name: str | None = None, alias: Any = None) -> None:
        given = str(name).replace("_", "-").replace(" ", "-").lower()
        if cls is BaseCompressor and given == FORMAT and value is not ArmorCompressor:
            release(FORMAT)
        register_value(cls, value, name=name, alias=alias)

    return registered


def _checked(compress_model: Callable[..., None]) -> Callable[..., None]:
    """Another package's layout for our layers would be filled by nothing that the checkpoint holds, with a warning alone."""

    @wraps(compress_model)
    def compress_checked(self: Any, model: nn.Module, *args: Any, **options: Any) -> None:
        if any(map(_is_to_be_armor, model.modules())):
            check_registered()
        shapes = {
            name: (m.out_features, m.in_features) for name, m in model.named_modules() if isinstance(m, nn.Linear)
        }
        compress_model(self, model, *args, **options)
        for name, shape in shapes.items():
            lay_out_zero_point(model.get_submodule(name), shape)

    return compress_checked


def _is_to_be_armor(module: nn.Module) -> bool:
    weights = getattr(getattr(module, "quantization_scheme", None), "weights", None)
    return BLOCK_SIZE_KEY in (getattr(weights, "observer_kwargs", None) or {})


def _forget_quantization(module: nn.Linear) -> None:
    """Remove what the stock quantizer attached for a dense weight: a forward that quantises, and its scales."""
    module.__dict__.pop("forward", None)
    for name in [*module._parameters, *module._buffers]:
        if name not in ("weight", "bias"):
            delattr(module, name)


def _join_sharers(model: nn.Module) -> None:
    """Let layers use the B of the module that their config group names. Raises `CheckpointError` where they cannot."""
    where = "quantization_config"
    modules = model.named_modules(remove_duplicate=False)
    layers = {name: module for name, module in modules if isinstance(module, ArmorLinear)}
    attached: Any = [getattr(layer, "quantization_scheme", None) for layer in layers.values()]
    for scheme in {id(scheme): scheme for scheme in attached if scheme is not None}.values():
        weights = scheme.weights.model_dump()
        owners = input_factors_of(weights, targets=scheme.targets, where=where)
        tied = tied_weights_of(weights, targets=scheme.targets, where=where)
        for sharer, owner in (*owners.items(), *tied.items()):
            if sharer not in layers or owner not in layers:
                what = "weight" if sharer in tied else "B"
                raise CheckpointError(
                    f"{where} lets {sharer} use the {what} of {owner}, and one of them is no ARMOR layer here"
                )
            layers[sharer].label, layers[owner].label = sharer, owner
        for sharer, owner in owners.items():
            layers[sharer].share_input_factor(layers[owner])
        for use, owner in tied.items():
            layers[use].tie(layers[owner])
        tie_packed(model, tied)


def _unless_all_armor(add_hook: Callable[..., None]) -> Callable[..., None]:
    @wraps(add_hook)
    def add_decompress_hook(self: Any, model: nn.Module) -> None:
        _join_sharers(model)
        quantized = [module for module in model.modules() if is_module_quantized(module)]
        if not quantized or not all(isinstance(module, ArmorLinear) for module in quantized):
            add_hook(self, model)

    return add_decompress_hook


register()
