"""Models and tokenizers named by a recipe, loaded through transformers."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from armor_recipes import builtin
from armor_recipes.checkpoint.compressed import CompressedModel, check_readable, open_compressed
from armor_recipes.checkpoint.files import read_config
from armor_recipes.checkpoint.stored import StoredTensors, is_all_there
from armor_recipes.compute.scratch import Scratch
from armor_recipes.errors import ArmorError, InputError, PlanError
from armor_recipes.exhaustion import what_ran_out
from armor_recipes.integrations.classes import class_of
from armor_recipes.integrations.names import origins
from armor_recipes.model.facts import ModelFacts, attention_of_parts, facts_of
from armor_recipes.model.forms import linearise
from armor_recipes.modifiers.distillation.modifier import multiplies_bfloat16
from armor_recipes.paths import user_path
from armor_recipes.recipe.schema import ModelSpec

BUILTIN_PREFIX = "builtin:"
ADAPTER_FILE = "adapter_config.json"
_ALIGNMENT = 64
#: An attention implementation by transformers' name, one for each part of a composite model, or transformers' choice.
Attention = str | dict[str, Any] | None
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a recipe's model comes from, its configuration, and the dtypes to store and compute in."""

    location: str
    revision: str | None
    config: PretrainedConfig
    stored_dtype: torch.dtype
    compute_dtype: torch.dtype
    asked_dtype: torch.dtype | None = None
    """What the recipe says that tensors are stored in; None where each keeps its own."""
    compressed: CompressedModel | None = None
    """What of it is packed or quantised; None for a dense model."""
    _read: dict[Path, StoredTensors] = field(default_factory=dict, repr=False, compare=False)
    """Headers that were read. A folder that holds no weights yet, of a hub model that is still to come, is asked again."""

    @property
    def facts(self) -> ModelFacts:
        """What the config says."""
        return facts_of(self.config)

    @property
    def folder(self) -> Path | None:
        """The local folder, or None for a hub id."""
        path = Path(self.location)
        return path if path.is_dir() else None

    @property
    def files(self) -> Path | None:
        """The folder that the model's files lie in: the local one, or what the hub's cache has of it; None without either."""
        return self.folder or _cached_snapshot(self.location, self.revision)

    def stored(self) -> StoredTensors | None:
        """What tensors the files hold, asked of them once; None where there are none (yet), or of another kind (GGUF).

        Raises InputError where they are damaged.
        """
        folder = self.files
        if folder is None or (self.folder is None and not is_all_there(folder)):
            return None
        found = self._read.get(folder) or StoredTensors(folder)
        if not found.tensors:
            return None
        self._read[folder] = found
        return found

    @property
    def is_safetensors(self) -> bool:
        """Whether the files are safetensors files, which can be read tensor by tensor."""
        there = self.stored()
        return there is not None and there.is_safetensors

    def uncompressed(self, tensors: Iterable[str]) -> list[str]:
        """Those of the files' tensors that are no part of a packed or quantised layer."""
        names = list(tensors)
        return names if self.compressed is None else self.compressed.without_own(names)


def open_model(spec: ModelSpec, *, device: torch.device, compressed: bool = False) -> ModelSource:
    """Read a model's configuration, no weights, and what of it is packed or quantised.

    With `compressed` the latter is of no matter. Raises InputError where it cannot be read, and PlanError where it is compressed
    in a way that a recipe does not take.
    """
    location = spec.id
    if location.startswith(BUILTIN_PREFIX):
        location = str(builtin.model_folder(location.removeprefix(BUILTIN_PREFIX)))
    else:
        location = str(user_path(location))
    if spec.revision is not None and Path(location).is_dir():
        raise InputError(
            f"model {spec.id} is a local folder, which has no revision {spec.revision!r}; remove `revision`"
        )
    if not Path(location).exists() and (spec.id.startswith((".", "/", "~")) or spec.id.count("/") > 1):
        raise InputError(
            f"model {spec.id!r} cannot be read: there is no such folder (paths are relative to the working directory); give "
            "a folder with a config.json, a hub id, or builtin:NAME"
        )
    try:
        config = AutoConfig.from_pretrained(location, revision=spec.revision, trust_remote_code=False)
    except Exception as error:  # transformers' own validation errors share no base class
        raise InputError(_unreadable(spec.id, error)) from error
    asked = _DTYPES.get(spec.dtype)
    packed = _compressed(location, spec.id, config) if facts_of(config).quantized and not compressed else None
    source = ModelSource(location, spec.revision, config, asked or torch.float32, torch.float32, asked, packed)
    _refuse_adapter(source, spec.id)
    stored = asked or source.facts.dtype or _written_dtype(source, spec.id)
    if stored not in _DTYPES.values():
        raise PlanError(
            f"model {spec.id} is stored in {stored}, and checkpoints are in {', '.join(_DTYPES)}: set model.dtype to one of them"
        )
    if spec.compute_dtype != "auto":
        compute = _DTYPES[spec.compute_dtype]
    else:
        half = spec.memory is not None and stored == torch.bfloat16 and multiplies_bfloat16(device)
        compute = torch.float32 if device.type == "cpu" and not half else stored
    return replace(source, stored_dtype=stored, compute_dtype=compute)


def _compressed(location: str, name: str, config: PretrainedConfig) -> CompressedModel:
    """What is packed or quantised in a folder. Raises PlanError for a hub id, of which no header is here yet."""
    if Path(location).is_dir():
        return open_compressed(Path(location))
    quantization: Any = config.quantization_config
    check_readable(quantization if isinstance(quantization, Mapping) else quantization.to_dict(), name)
    raise PlanError(
        f"model {name} is compressed, and such models are read from a folder, for the headers of their files: download it "
        f"(hf download {name} --local-dir FOLDER) and give that"
    )


def open_teacher(
    spec: ModelSpec, source: ModelSource, shapes: PreTrainedModel, device: torch.device
) -> ModelSource | None:
    """The dense model that a compressed one was made from, where a recipe names it; `shapes` is the compressed one on meta.

    Raises PlanError where the model is not compressed, or the teacher is, or another model.
    """
    if spec.teacher is None:
        return None
    if source.compressed is None or not source.compressed.ours:
        raise PlanError(
            f"model.teacher {spec.teacher} goes with a packed model, and {spec.id} is a dense one here: leave it out"
        )
    compute: Any = str(source.compute_dtype).removeprefix("torch.")
    teacher = open_model(ModelSpec(id=spec.teacher, compute_dtype=compute), device=device)
    if teacher.compressed is not None:
        raise PlanError(f"model.teacher {spec.teacher} is compressed, too: name the dense model")
    theirs, own = (_shapes(model) for model in (meta_model(teacher), shapes))
    other = sorted(name for name in theirs.keys() | own.keys() if theirs.get(name) != own.get(name))
    if other:
        found = ", ".join(str(each.get(other[0], "none")) for each in (theirs, own))
        raise PlanError(
            f"model.teacher {spec.teacher} is another model than {spec.id}: {other[0]} and {len(other) - 1} more differ ({found})"
        )
    return teacher


def _shapes(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def load_teacher(teacher: ModelSource, model: PreTrainedModel, forms: Collection[str]) -> dict[str, Tensor]:
    """The dense model's parameters where they are not the given model's own, which has those linear forms."""
    dense = load_model(teacher, device=next(model.parameters()).device)
    linearise(dense, forms)
    own = dict(model.named_parameters())
    return {name: value.detach() for name, value in dense.named_parameters() if not torch.equal(value, own[name])}


def _written_dtype(source: ModelSource, name: str) -> torch.dtype:
    """The float dtype of most numbers in the model's files, for a config.json that names none; float32 where it has no files.

    Raises InputError for a hub model whose files cannot be asked.
    """
    stored = source.stored()
    if source.folder is not None:
        return (None if stored is None else stored.dtype) or torch.float32
    from huggingface_hub import get_safetensors_metadata

    if stored is not None and stored.dtype is not None:
        return stored.dtype
    try:
        counts = get_safetensors_metadata(source.location, revision=source.revision).parameter_count
    except Exception as error:  # the hub client raises errors of many libraries, without a common base
        raise InputError(
            f"model {name}: its config.json names no dtype, and its files cannot be asked ({type(error).__name__}); set model.dtype"
        ) from error
    known = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
    most = max(counts, key=lambda key: counts[key] or 0, default=None)
    return known.get(str(most), torch.float32)


def _refuse_adapter(source: ModelSource, name: str) -> None:
    """Transformers loads an adapter that lies beside a model onto it where peft is installed, and else leaves it alone."""
    files = source.files
    if files is not None and (files / ADAPTER_FILE).exists():
        raise PlanError(
            f"model {name} holds a PEFT adapter beside its weights ({ADAPTER_FILE}), which is part of the model only where peft "
            "is installed: merge it first (merge_and_unload, then save_pretrained), or move the adapter's files away"
        )


def hub_id(source: ModelSource) -> str | None:
    """The hub id of a model: the source itself, or what the config.json of a local folder says it was made from; else None."""
    if source.folder is None:
        return source.location
    recorded = read_config(source.folder).get("_name_or_path")
    if isinstance(recorded, str) and _HUB_ID.fullmatch(recorded) and not Path(recorded).exists():
        return recorded
    return None


def fetch_files(source: ModelSource, patterns: Iterable[str]) -> None:
    """Bring files of a hub model into the hub's cache, as far as the hub can be reached; `patterns` are in lower case."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    if source.folder is not None:
        return
    spelled = [
        spelling
        for pattern in patterns
        for spelling in (pattern, pattern.upper(), pattern.title(), _stem_upper(pattern))
    ]
    with contextlib.suppress(HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError):
        snapshot_download(source.location, revision=source.revision, allow_patterns=spelled)


def _stem_upper(pattern: str) -> str:
    """`readme.md` as `README.md`."""
    stem, dot, suffix = pattern.rpartition(".")
    return f"{stem.upper()}{dot}{suffix}"


def _cached_snapshot(location: str, revision: str | None) -> Path | None:
    """The hub cache's folder of a model whose config.json was read."""
    from huggingface_hub import try_to_load_from_cache

    try:
        file = try_to_load_from_cache(location, "config.json", revision=revision)
    except ValueError:  # no possible hub id
        return None
    return Path(file).parent if isinstance(file, str) else None


def meta_model(source: ModelSource) -> PreTrainedModel:
    """The model on the meta device: names and shapes without a byte of weights.

    Raises PlanError where transformers has no class for it, InputError where the configuration makes no model.
    """
    kind = class_of(source.config, source.location)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind._from_config(source.config)
            model.tie_weights()
    except Exception as error:  # a wrong value in config.json raises whatever the architecture's code meets first
        raise InputError(_unreadable(source.location, error)) from error
    return model


def load_model(source: ModelSource, *, device: torch.device, scratch: Scratch | None = None) -> PreTrainedModel:
    """The model in its compute dtype on `device`, in evaluation mode. Raises InputError where weights are missing or unreadable.

    Its numbers are those of the stored dtypes, see `rounded`. With a `scratch` it is on the CPU, and its weights are in that.
    """
    if scratch is not None:
        model = load_dense(
            source.location,
            dtype=source.compute_dtype,
            device=torch.device("cpu"),
            revision=source.revision,
            state=_mapped_state(source, scratch),
        )
        return rounded(with_generation_config(model, source), written_dtypes(model, source))
    if source.compressed is not None:
        return _load_compressed(source, source.compressed, device)
    model = load_dense(source.location, dtype=source.compute_dtype, device=device, revision=source.revision)
    return rounded(model, written_dtypes(model, source))


def _mapped_state(source: ModelSource, scratch: Scratch) -> dict[str, Tensor]:
    """The tensors of the files in the scratch, one after the other, in the dtypes that a loader gives them."""
    there, kept = source.stored(), kept_in_float32(meta_model(source), source.compute_dtype)
    assert there is not None, "checked by the plan"
    state = {}
    for name in there.tensors:
        tensor = there.read(name)
        cast = tensor.is_floating_point() and not kept(name)
        state[name] = scratch.keep(tensor, source.compute_dtype if cast else None)
    return state


def _load_compressed(source: ModelSource, compressed: CompressedModel, device: torch.device) -> PreTrainedModel:
    """What is packed or quantised and stays so is not rounded: its weights are products of what is stored."""
    from armor_recipes.integrations.compressed import load_compressed  # it imports what imports this

    model = load_compressed(compressed, dtype=source.compute_dtype, stored=source.stored_dtype, device=device)
    kept = {f"{name}.weight" for name in (*compressed.layers, *compressed.kept)}
    dtypes = written_dtypes(model, source)
    return rounded(model, {name: dtype for name, dtype in dtypes.items() if name not in kept})


def written_dtypes(model: PreTrainedModel, source: ModelSource) -> dict[str, torch.dtype]:
    """The dtype on disk of each float tensor of `model.state_dict()`: its own in the source's files.

    Where a recipe names a dtype all are in that, but for those that the architecture keeps in float32, which keep their own.
    Tied tensors have the dtype of whichever the files name; what they do not name at all is in `source.stored_dtype`. Those
    that are never saved, and that loaders make anew (Marian's sinusoidal positions), are left out.
    """
    asked = source.asked_dtype
    kept = None if asked is None else kept_in_float32(model, asked)
    there = source.stored()
    stored = {} if there is None else there.tensors
    names = _with_tied(model, origins(model, stored))
    found = {}
    for name in _saved_floats(model, names):
        dtypes = {stored[part].dtype for part in names[name]}
        dtype = next(iter(dtypes)) if len(dtypes) == 1 else None
        if asked is not None and kept is not None:
            dtype = (dtype or torch.float32) if kept(name) else asked
        found[name] = dtype or source.stored_dtype
    return found


def _with_tied(model: PreTrainedModel, names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The same, and for a tensor that the files do not name, what they name of another that it is tied to."""
    places = {name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    named = {places[name]: parts for name, parts in names.items() if parts and name in places}
    return {name: parts or named.get(places.get(name, 0), ()) for name, parts in names.items()}


def _saved_floats(model: PreTrainedModel, names: Mapping[str, tuple[str, ...]]) -> list[str]:
    """The float tensors that are saved, or that the source's files hold under some `names`."""
    ignored = set(model._keys_to_ignore_on_save or ())
    state = model.state_dict().items()
    return [name for name, tensor in state if tensor.is_floating_point() and (names[name] or name not in ignored)]


def kept_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Whether transformers keeps a tensor of that name in float32 where it is asked for `dtype`."""
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype == torch.float16:
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    if dtype not in (torch.float16, torch.bfloat16) or not patterns:
        return lambda _: False
    kept = re.compile("|".join(re.escape(pattern).replace(r"\*", ".*") for pattern in sorted(patterns)))
    return lambda name: kept.search(name) is not None


def rounded(model: PreTrainedModel, dtypes: Mapping[str, torch.dtype]) -> PreTrainedModel:
    """The same model with everything that is saved rounded in place to its dtype on disk, so that computing starts from that.

    (Casting to the stored dtype and back would round the rotary frequencies too, which no later loader does.) Raises
    InputError for numbers that do not fit.
    """
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            dtype = dtypes.get(name, tensor.dtype)
            if not tensor.is_floating_point() or tensor.dtype == dtype or tensor.dtype.itemsize < dtype.itemsize:
                continue
            cast = tensor.to(dtype)
            lost = int((cast.isfinite() != tensor.isfinite()).sum())
            if lost:
                raise InputError(f"{lost} numbers of {name} do not fit {dtype}: set model.dtype to bfloat16 or float32")
            tensor.copy_(cast)
    return model


def load_dense(
    location: str,
    *,
    dtype: torch.dtype,
    device: torch.device,
    revision: str | None = None,
    attention: Attention = None,
    state: Mapping[str, Tensor] | None = None,
) -> PreTrainedModel:
    """A stock model from a folder or hub id, in evaluation mode. Raises InputError where weights are missing or unreadable.

    `attention` is the implementation to run on, or one for each part of a composite model (`attention_of`); transformers' choice
    where it is None. `state` are the tensors by the names of the files, for which those are then not read.
    """
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": False}
    try:
        # `return_dict`, whatever config.json says: here outputs are read by name.
        config = AutoConfig.from_pretrained(location, return_dict=True, **options)
        load: Any = class_of(config, location).from_pretrained
        # Weights of the wrong shape are told by `info`, with their names, which transformers' own error leaves out.
        model, info = load(
            location if state is None else None,
            config=config if state is None else _plain_config(config),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **({"state_dict": dict(state)} if state is not None else {}),
            **options,
            **attention_option(attention),
        )
    except Exception as error:
        if isinstance(error, ArmorError) or what_ran_out(error):
            raise
        raise InputError(_unreadable(location, error)) from error
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "mismatched_keys") if info.get(kind)}
    if problems:
        raise InputError(f"the weights of {location} do not fit its config.json: {problems}")
    module: nn.Module = model
    module.to(device=device).eval()
    loaded: PreTrainedModel = model
    return own_memory(loaded)


def _plain_config(config: PretrainedConfig) -> PretrainedConfig:
    """Of a model whose weights come unpacked."""
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def attention_option(attention: Attention) -> dict[str, Any]:
    """The keyword of `from_pretrained` for an attention implementation; none where nothing is asked for."""
    return {} if attention is None else {"attn_implementation": attention}


def attention_of(model: PreTrainedModel) -> Attention:
    """The attention implementation that a model runs on, by transformers' name; a dict by the names of the parts where they run on
    several, as a vision tower without `sdpa` and its text model.
    """
    return attention_of_parts(model.config)


def own_memory(model: PreTrainedModel, *, mapped: Collection[int] = ()) -> PreTrainedModel:
    """The same model with every tensor in aligned memory that autograd may use, tied ones together.

    A tensor mapped from a file can start at any byte, where products may round otherwise; one made in inference mode can be
    neither trained nor changed. Integers, and those whose `id` is in `mapped`, are only unpacked: they stay where they are.
    """
    made: dict[int, Any] = {}
    with torch.inference_mode(False), torch.no_grad():
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is not None and tensor.is_inference():
                        if id(tensor) not in made:
                            made[id(tensor)] = _normal(tensor)
                        tensors[name] = made[id(tensor)]
                    elif tensor is None or not tensor.is_floating_point() or id(tensor) in mapped:
                        continue
                    elif tensor.is_cpu and tensor.data_ptr() % _ALIGNMENT:
                        tensor.data = tensor.data.clone()
    return model


def _normal(tensor: Tensor) -> Tensor:
    """A copy of what was made in inference mode."""
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(tensor.clone(), requires_grad=tensor.requires_grad)
    return tensor.clone()


def moved(model: PreTrainedModel, *, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The same model, moved in place, in evaluation mode.

    Only what is saved is cast: `model.to(dtype)` would round the rotary frequencies too, which no later loader does. What the
    architecture keeps in float32 stays in it.
    """
    module: nn.Module = own_memory(model)
    module.to(device=device).eval()
    kept = kept_in_float32(model, dtype)
    for name, tensor in module.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept(name) else dtype)
    return model


def with_generation_config(model: PreTrainedModel, source: ModelSource) -> PreTrainedModel:
    """The same model, which may be on the meta device, with the generation config that loading the source gives it.

    Raises InputError where that cannot be read.
    """
    if not model.can_generate():
        return model
    ways: tuple[dict[str, Any], ...] = ({}, {"config_file_name": "config.json", "_from_model_config": True})
    for options in ways:  # as from_pretrained
        try:
            model.generation_config = GenerationConfig.from_pretrained(
                source.location, revision=source.revision or "main", **options
            )
            return model
        except OSError:
            continue
        except Exception as error:  # a wrong value raises whatever transformers meets first
            raise InputError(f"the generation config: {_unreadable(source.location, error)}") from error
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


def load_processor(source: ModelSource, text: bool) -> Any:
    """The model's processor of images, with `text` the one for both; it computes with Pillow, to the same bits everywhere.

    Raises InputError where Pillow is not there, or the model has no processor.
    """
    if importlib.util.find_spec("PIL") is None:
        raise InputError("images need Pillow, which is not installed: pip install 'armor-recipes[vision]'")
    kind: Any = AutoProcessor if text else AutoImageProcessor
    try:
        return kind.from_pretrained(source.location, revision=source.revision, trust_remote_code=False, backend="pil")
    except ImportError as error:
        raise InputError("images need transformers 5.18 or later, or torchvision beside an older one") from error
    except Exception as error:  # as in `load_tokenizer`
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"the processor of {source.location} cannot be read ({reason}); add its preprocessor_config.json, or give a "
            ".safetensors file of inputs"
        ) from error


def _unreadable(name: str, error: Exception) -> str:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if not user_path(name).exists():
        reason = f"there is no such folder, and as a hub id: {reason}"
    return (
        f"model {name!r} cannot be read ({reason}); give a folder with a config.json, "
        f"a hub id that this machine can reach, or builtin:NAME"
    )
