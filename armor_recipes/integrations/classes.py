"""Which of transformers' classes a model is: the one that its config.json names."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PretrainedConfig,
    PreTrainedModel,
)

from armor_recipes.errors import PlanError
from armor_recipes.model.facts import facts_of

_SEQUENCES = (AutoModelForSeq2SeqLM, AutoModelForSpeechSeq2Seq)
_AUTO = (
    AutoModelForCausalLM,
    *_SEQUENCES,
    AutoModelForImageTextToText,
    AutoModelForMaskedLM,
    AutoModel,
)


def class_of(config: PretrainedConfig, location: str) -> type[PreTrainedModel]:
    """The class named by `architectures`; where it names none of transformers', the first that an auto class has for the config.

    Raises PlanError where transformers has no class for the config, or the one named is another architecture's.
    """
    named = [found for name in config.architectures or () if (found := _of_transformers(name)) is not None]
    fitting = next((found for found in named if _takes(found, config)), None)
    if fitting is not None:
        return fitting
    if named:
        raise PlanError(
            f"model {location}: its config.json names {named[0].__name__}, which takes a {_config_name(named[0])}, and is a "
            f"{type(config).__name__} by its model_type {config.model_type!r}: correct architectures or model_type"
        )
    for auto in (*_SEQUENCES, *_AUTO) if facts_of(config).encoder_decoder else _AUTO:
        mapped: Any = auto._model_mapping.get(type(config), None)
        mapped = mapped[0] if isinstance(mapped, (list, tuple)) else mapped
        if mapped is not None and _takes(mapped, config):
            kind: type[PreTrainedModel] = mapped
            return kind
    raise PlanError(
        f"model {location} ({type(config).__name__}, architectures {config.architectures}): transformers "
        f"{transformers.__version__} has no model class for it"
    )


def _of_transformers(name: object) -> type[PreTrainedModel] | None:
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    return found if isinstance(found, type) and issubclass(found, PreTrainedModel) else None


def _takes(model: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    wanted = getattr(model, "config_class", None)
    return isinstance(wanted, type) and isinstance(config, wanted)


def _config_name(model: type[PreTrainedModel]) -> str:
    return getattr(getattr(model, "config_class", None), "__name__", "config of its own")
