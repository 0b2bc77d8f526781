"""What transformers' quantizer does before it fills a model from an ARMOR checkpoint: linear forms, packed layers, names."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from armor_recipes.checkpoint.config import FORMAT, SCALE, TENSOR_NAMES, VALUES
from armor_recipes.checkpoint.quantized import WEIGHT_PACKED, WEIGHT_SCALE
from armor_recipes.errors import CheckpointError
from armor_recipes.integrations.rotations import run_rotations
from armor_recipes.model.facts import text_config
from armor_recipes.model.forms import forms_of, layouts, linearise

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_READING = "_armor_names_in_files"
_FILES = "_armor_files"


def wrap_quantizer(quantizer: Any) -> None:
    """Let `from_pretrained` lay out linear forms, take tensors that lie in files under the modules' own names as they are, and
    make rotations as the model runs.

    `quantizer` is transformers' class for compressed-tensors: importing that here would be a circle, since the import registers.
    """
    quantizer._process_model_before_weight_loading = _laying_out(quantizer._process_model_before_weight_loading)
    quantizer._process_model_after_weight_loading = _rotating(quantizer._process_model_after_weight_loading)
    quantizer.update_weight_conversions = _without_conversions(quantizer.update_weight_conversions)


def lay_out(model: PreTrainedModel, names: Collection[str]) -> tuple[str, ...]:
    """Give a meta model the linear forms that these names of linear layers belong to; returns the names of the forms."""
    _fuse_again(model)
    forms = linearise(model, frozenset(forms_of(model, names)))
    _leave_alone(model, forms)
    return forms


def tie_packed(model: nn.Module, tied: Mapping[str, str]) -> None:
    """Let transformers tie all tensors of packed layers whose weights it ties, as it loads, and as it saves.

    Args:
        model: with packed layers, as yet empty.
        tied: full name of a layer → of the one under whose name the tensors of both are stored.

    Raises:
        CheckpointError: where the model does not tie these weights.
    """
    for use, owner in tied.items():
        known: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
        if known.get(f"{use}.{VALUES}") != f"{owner}.{VALUES}":
            raise CheckpointError(
                f"quantization_config gives {use} the weight of {owner}, which this {type(model).__name__} does not tie: "
                "config.json does not belong to this model, or its tie_word_embeddings was changed"
            )
        own = [part for part in (*TENSOR_NAMES, SCALE) if part in model.get_submodule(use)._parameters]
        found = {f"{use}.{part}": f"{owner}.{part}" for part in own}
        known.update(found)
        _save_once(model, found)


def _save_once(model: Any, tied: Mapping[str, str]) -> None:
    """Saving leaves out tied tensors by patterns of names; where these name weights alone they are told of the rest."""
    parts = {name: part for name, part in model.named_modules() if getattr(part, "_tied_weights_keys", None)}
    patterns = [f"{name}.{key}" if name else key for name, part in parts.items() for key in part._tied_weights_keys]
    unknown = {use: owner for use, owner in tied.items() if not any(re.search(p, use) for p in patterns)}
    if unknown:
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **unknown}


def _leave_alone(model: PreTrainedModel, forms: Collection[str]) -> None:
    """Keep the architecture from initialising fused parameters that are gone, where it looks for them from a module beside them.

    A module with parameters or buffers of its own is left to it: it makes anew what files do not hold (a causal mask, say).
    """
    known = layouts(model)
    gone = {form: known[form].fused.keys() - known[form].parts.keys() for form in forms}
    holders = {f"{form}.{fused}".rpartition(".")[0] for form, names in gone.items() for fused in names}
    for name in {*(form.rpartition(".")[0] for form, names in gone.items() if names), *holders.difference(forms)}:
        _mark_initialised(model.get_submodule(name))


def _leave_packed_alone(model: PreTrainedModel) -> None:
    """Keep the architecture from initialising weights that are packed: GPT-2, T5 and CLIP reach for them from the module above."""
    packed = [name for name, module in model.named_modules() if WEIGHT_PACKED in module._parameters]
    for name in {name.rpartition(".")[0] for name in packed}:
        _mark_initialised(model.get_submodule(name))


def _mark_initialised(module: Any) -> None:
    """Tell transformers that nothing is to be initialised in a module, if it holds nothing itself."""
    if not any(True for own in (module.parameters, module.buffers) for _ in own(recurse=False)):
        module._is_hf_initialized = True


def _fuse_again(model: PreTrainedModel, stored: Collection[str] = ()) -> None:
    """Transformers takes Llama 4's experts apart for every quantised model: only those may be that are named, or `stored` so."""
    split = [name for name, m in model.named_modules() if type(m).__name__ == "SequentialLlama4TextExperts"]
    dense = [name for name in split if f"{name}.0.down_proj.weight" in stored]
    apart = {name for name in dense if f"{name}.0.down_proj.{WEIGHT_SCALE}" not in stored}
    split = [name for name in split if name not in apart]
    if not split:
        return
    from transformers.models.llama4.modeling_llama4 import Llama4TextExperts

    for name in split:
        with torch.device("meta"):
            fused: Any = Llama4TextExperts
            model.set_submodule(name, fused(text_config(model.config)))


def _laying_out(process: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(process)
    def process_model(self: Any, model: PreTrainedModel, **options: Any) -> Any:
        self.__dict__[_FILES] = tuple(options.get("checkpoint_files") or ())
        if self.compressor.quantization_config is None:  # rotations alone
            return None
        groups = self.compressor.quantization_config.config_groups
        if self.quantization_config.dequantize:
            return process(self, model, **options)
        stored = _names_in(options.get("checkpoint_files"))
        if not any(_is_ours(group) for group in groups.values()):
            if _lay_out_plain(model, stored or ()):
                self.__dict__[_READING] = model, stored
            process(self, model, **options)
            return _leave_packed_alone(model)
        ignore = tuple(self.compressor.quantization_config.ignore or ())
        targets = {target: group for group in groups.values() for target in group.targets}
        lay_out(model, (*targets, *ignore))
        self.__dict__[_READING] = model, stored
        modules = dict(model.named_modules(remove_duplicate=False))
        if not all(map(_is_ours, groups.values())) or not modules.keys() >= {*targets, *ignore}:
            process(self, model, **options)
            return _leave_packed_alone(model)
        _attach(modules, {target: group for target, group in targets.items() if target not in ignore})
        self.compressor.compress_model(model=model)
        return None

    return process_model


def _rotating(process: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(process)
    def process_model(self: Any, model: PreTrainedModel, **options: Any) -> Any:
        found = process(self, model, **options)
        run_rotations(model, self.__dict__.pop(_FILES, ()))
        return found

    return process_model


def _lay_out_plain(model: PreTrainedModel, stored: Collection[str]) -> tuple[str, ...]:
    """Give the model the linear forms of layers that files hold quantised; returns the names of the forms."""
    ends = (f".{WEIGHT_PACKED}", f".{WEIGHT_SCALE}")
    _fuse_again(model, stored)
    forms = linearise(model, forms_of(model, (name.rpartition(".")[0] for name in stored if name.endswith(ends))))
    _leave_alone(model, forms)
    return forms


def _attach(modules: dict[str, nn.Module], schemes: dict[str, Any]) -> None:
    """As `apply_quantization_config`, which compares each module with each target: hours for a mixture of many experts."""
    from armor_recipes.integrations.upstream import QuantizationStatus

    for name, scheme in schemes.items():
        module: Any = modules[name]
        module.quantization_scheme, module.quantization_status = scheme, QuantizationStatus.COMPRESSED


def _without_conversions(update: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(update)
    def update_weight_conversions(self: Any, conversions: list[Any], *others: Any) -> list[Any]:
        if _READING not in self.__dict__:
            return update(self, conversions, *others)  # type: ignore[no-any-return]
        model, names = self.__dict__.pop(_READING)  # transformers before 5.23 does not hand over the model
        own = [name for name, _ in model.named_parameters() if name not in model.all_tied_weights_keys]
        if names is not None and names.issuperset(own):
            return []
        return [one for one in conversions if _leads_to(one, own)]

    return update_weight_conversions


def _leads_to(conversion: Any, names: Iterable[str]) -> bool:
    """Whether what a conversion makes can be a tensor of the model; a renaming that leads nowhere is left out by the loader."""
    if not hasattr(conversion, "operations"):
        return True
    made = conversion.reverse_transform().compiled_sources
    return any(made.search(name) for name in names)


def _names_in(files: Iterable[str] | None) -> frozenset[str] | None:
    """Names of the tensors in safetensors files; None where there are none, or others."""
    files = list(files or ())
    if not files or not all(str(file).endswith(".safetensors") for file in files):
        return None
    found: set[str] = set()
    for file in files:
        with safe_open(file, framework="pt") as opened:
            found.update(opened.keys())
    return frozenset(found)


def _is_ours(group: Any) -> bool:
    return bool(group.format == FORMAT)
