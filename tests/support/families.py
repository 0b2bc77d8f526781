"""Every family of models that transformers knows, as tiny random models made from its own mappings, and inputs for them."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from tests.support.family_overrides import OVERRIDES

HIDDEN, INNER, HEADS, VOCABULARY, POSITIONS, IMAGE, PATCH = 64, 128, 4, 256, 128, 32, 8

#: What a field of a config that holds an int is called, and the most it may be; the first that fits counts. None: left as it is.
FIELDS: tuple[tuple[re.Pattern[str], int | None], ...] = tuple(
    (re.compile(name), size)
    for name, size in (
        (
            r"chunk_size_feed_forward|pretraining_tp|.*stride|.*kernel(_size|_dim)?|.*(loss|cost).*|type_vocab_size",
            None,
        ),
        (r".*(experts_per_tok(en)?|experts_topk|num_topk|top_k|moe_topk|moe_k|top_k_experts|experts_top_k)", 2),
        (r"mm_tokens_per_image", 4),
        (r"n_group|topk_group|num_expert_groups?|.*limited_groups?", 1),
        (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_kv_shared_layers", 1),
        (r"(n|num)_(shared|zero)_experts|moe_num_shared_experts|.*nextn_predict_layers|num_mtp_layers", None),
        (r".*num_.*experts|n_routed_experts|num_experts_.*|moe_num_experts", 8),
        (r".*(key_value|kv)_heads|.*num_key_heads|num_kv|multi_query_group_num", 2),
        (r".*rope_head_dim|rotary_dim", 8),
        (r".*head_dim.*|d_kv|dim_head|kv_channels|.*head_size|mamba_d_head", 16),
        (r".*lora_rank", 32),
        (r".*heads?|.*n_head", HEADS),
        (r".*codebook_size|num_embeddings|.*vocab.*size.*", VOCABULARY),
        (r"(.*_)?(layers?|depth)|(.*_)?num_.*layers.*|.*num_.*_?blocks", 2),
        (r".*(intermediate|ffn|mlp|feed_?forward|inner|ff).*(size|dim)|d_ff|n_inner|dim_feedforward|mlp_dim", INNER),
        (r".*(moe|expert).*(size|dim)", INNER),
        (r".*image_size|img_size|eval_size|crop_size|resolution|input_resolution", IMAGE),
        (r"temporal_patch_size", None),
        (r".*patch_size", PATCH),
        (r".*(max.*positions?(_embeddings)?|n_positions|max_seq_len.*|n_ctx|context_length|max_position)", POSITIONS),
        (
            r".*(hidden_size|hidden_dim|d_model|n_embd|embed_dim|projection_dim|proj_dim|embedding_dim|embedding_size).*",
            HIDDEN,
        ),
        (r".*(model_dim|emb_dim|hidden_dims?|encoder_dim|decoder_dim|fusion_dim|output_dim|projection_size)", HIDDEN),
        (r"num_queries|num_denoising|.*query_tokens|num_latents", 8),
    )
)
#: The same for lists of ints, by stages.
LISTS: tuple[tuple[re.Pattern[str], tuple[int, ...]], ...] = tuple(
    (re.compile(name), sizes)
    for name, sizes in (
        (r"depths?|num_block_repeats", (2,) * 8),
        (r".*heads", (1, 2, 4, 4, 4, 4)),
        (r"deepstack_visual_indexes|.*fullatt_block_indexes|.*global_attn_indexes", (1,)),
        (r"hidden_sizes|embed_dims?|neck_hidden_sizes|layer_channels", (16, 32, 64, 64, 64, 64)),
    )
)
_TOKEN = re.compile(
    r".*(token|tok)(en)?_(id|index)|(bos|eos|pad|sep|unk|mask|boi|eoi|boa|eoa)_(token_)?(id|index)|.*_token_id"
)


_LAYER_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types")
_COMPUTED = {
    "layer_types",
    "mlp_layer_types",
    "layers_block_type",
    "id2label",
    "label2id",
    "per_layer_config",
    "rope_parameters",
}


def model_types() -> tuple[str, ...]:
    """Every model type of transformers that has a config of its own, in its order."""
    return tuple(name for name in CONFIG_MAPPING.keys() if CONFIG_MAPPING[name].model_type in (name, ""))  # noqa: SIM118


def tiny_config(model_type: str, **given: Any) -> PreTrainedConfig:
    """A small config of that type: its fields by FIELDS and LISTS, its parts likewise, `given` and OVERRIDES before all else."""
    return _shrunk(CONFIG_MAPPING[model_type], {**OVERRIDES.get(model_type, {}), **given})


def _shrunk(
    kind: type[PreTrainedConfig], given: dict[str, Any], like: PreTrainedConfig | None = None
) -> PreTrainedConfig:
    """A small config of that class; `like` has what its fields were, and `given` what they are, also `part.field` of parts."""
    own = {name: value for name, value in given.items() if "." not in name}
    default = kind() if like is None else like
    ids = iter(range(VOCABULARY - 1, 0, -1))
    values = dict(_fields(kind, default, ids, kept=like is not None))
    for name in kind.sub_configs:
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig) and name not in own:
            inner = {k.removeprefix(name + "."): v for k, v in given.items() if k.startswith(name + ".")}
            values[name] = _shrunk(type(part), {**OVERRIDES.get(type(part).model_type, {}), **inner}, part)
    return _all_kinds_of_layers(kind, {**values, **own}, default, fixed=set(own))


def _all_kinds_of_layers(
    kind: type[PreTrainedConfig], values: dict[str, Any], default: PreTrainedConfig, fixed: set[str]
) -> PreTrainedConfig:
    """The config with as many layers (2, 4, … 8) as it takes to have all kinds of layers that the default has."""
    wanted = _layer_kinds(default)
    name = next(
        (n for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers") if n in values and n not in fixed), None
    )
    if name is None or len(wanted) < 2 or fixed & set(_LAYER_KINDS):
        return kind(**values)
    for layers in (2, 3, 4, 6, 8):
        config = kind(**{**values, name: layers})
        if _layer_kinds(config) == wanted:
            break
    return config


def _layer_kinds(config: PreTrainedConfig) -> set[tuple[str, str]]:
    found = set()
    for name in _LAYER_KINDS:
        value = getattr(config, name, None)
        if isinstance(value, (list, tuple)):
            found |= {(name, str(entry)) for entry in value}
    return found


def _fields(
    kind: type[PreTrainedConfig], default: PreTrainedConfig, ids: Iterator[int], *, kept: bool
) -> Iterator[tuple[str, Any]]:
    """What a class's own fields are given: small numbers, token ids within the vocabulary, all else as in `default`."""
    for field in dataclasses.fields(kind):
        name, plain = field.name, field.default if field.default is not dataclasses.MISSING else None
        value = _value(default, name)
        if name == "head_dim" and value is None and not hasattr(default, "qk_rope_head_dim"):
            yield name, 16
        if value is None and re.fullmatch(r"(image|audio|video)_token_(id|index)", name):
            yield name, next(ids)
        if name == "image_grid_pinpoints" and value:
            yield name, [[IMAGE, IMAGE]]
        if name == "rope_parameters" and isinstance(value, dict) and "mrope_section" in value:
            yield name, {**value, "mrope_section": _sections_of(float(value.get("partial_rotary_factor", 1)))}
        if name in kind.sub_configs or value is None or isinstance(value, PreTrainedConfig):
            continue
        small = _small(name, value, ids)
        if name == "num_key_value_heads" and hasattr(default, "kv_lora_rank"):
            small = HEADS  # latent attention expands to all heads
        if small is not None and plain is not None:
            yield name, small
        elif kept and value != plain and name not in _COMPUTED:
            yield name, value if small is None else small


def _value(config: PreTrainedConfig, name: str) -> Any:
    """A field's value; None where layers differ in it and there is no one value."""
    try:
        return getattr(config, name, None)
    except AttributeError:
        return None
    except Exception as error:
        if "PerLayer" in type(error).__name__:
            return None
        raise


def _sections_of(part: float) -> list[int]:
    """Sections of rotary frequencies in time, height and width, of that part of a head of 16."""
    whole = int(16 * part) // 2
    return [whole - 2 * (whole // 4), whole // 4, whole // 4]


def _small(name: str, value: Any, ids: Iterator[int]) -> Any:
    """A value's small form, None where it stays as it is."""
    if isinstance(value, bool) or value is None:
        return None
    if _TOKEN.fullmatch(name):
        return next(ids) if isinstance(value, int) and value >= VOCABULARY - 32 else None
    if isinstance(value, int):
        most = next((size for pattern, size in FIELDS if pattern.fullmatch(name)), None)
        return None if most is None else min(value, most)
    if (
        isinstance(value, (list, tuple))
        and value
        and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    ):
        return _small_list(name, value)
    return None


def _small_list(name: str, value: Any) -> Any:
    sizes = next((sizes for pattern, sizes in LISTS if pattern.fullmatch(name)), None)
    if sizes is not None:
        return type(value)(min(a, b) for a, b in zip(value, sizes, strict=False))
    if re.fullmatch(r".*image_size|img_size|patch_size", name):
        return type(value)(min(v, PATCH if "patch" in name else IMAGE) for v in value)
    return None


# --- models --------------------------------------------------------------------------------------------------------------

#: Mappings of tasks to classes whose class of a family is its main one, the first that has it.
FIRST = (
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
    "MASKED_LM",
    "CAUSAL_LM",
    "MULTIMODAL_LM",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "CTC",
    "RETRIEVAL",
    "AUDIO_CLASSIFICATION",
    "OBJECT_DETECTION",
)
LAST = ("PRETRAINING", "BACKBONE", "TEXT_ENCODING")


def main_class(model_type: str) -> type[PreTrainedModel] | None:
    """The class that a family's models usually are, by transformers' mappings of tasks; None where it has no models."""
    config = CONFIG_MAPPING[model_type]
    tasks = [
        name.removeprefix("MODEL_FOR_").removesuffix("_MAPPING")
        for name in dir(modeling_auto)
        if name.startswith("MODEL_FOR_") and name.endswith("_MAPPING")
    ]
    for task in (*FIRST, *(t for t in tasks if t not in FIRST + LAST), "", *LAST):
        mapping = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING" if task else "MODEL_MAPPING", {})
        try:
            found = mapping.get(config, None)
        except ValueError:  # a class of the mapping that transformers does not export
            continue
        for kind in found if isinstance(found, tuple) else (found,):
            if kind is not None and getattr(kind, "config_class", None) is config:
                return kind
    return None


def tiny_model(kind: type[PreTrainedModel], config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A random model of that class whose numbers are those of bfloat16, held in float32; the global RNG is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind(config)
    model.eval()
    generator = torch.Generator().manual_seed(seed + 1)
    for parameter in model.parameters():
        if parameter.is_floating_point():
            noise = 0.02 * torch.randn(parameter.shape, generator=generator)
            parameter.data = (parameter.data + noise).bfloat16().float()
    return model
