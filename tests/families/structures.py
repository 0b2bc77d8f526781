"""Which structures the matrix has, and what is expected of those that do not come out right."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import transformers
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

EXPECTED = Path(__file__).with_name("expected.json")


@dataclass(frozen=True, slots=True, order=True)
class Structure:
    """A model type and the name of its class; without one it is the type's main class."""

    model_type: str
    model_class: str = ""

    def __str__(self) -> str:
        return f"{self.model_type}.{self.model_class}" if self.model_class else self.model_type

    @property
    def kind(self) -> type[PreTrainedModel] | None:
        """The class that is named, or None."""
        found: type[PreTrainedModel] | None = getattr(transformers, self.model_class) if self.model_class else None
        return found


#: Those of the default run.
TEN = tuple(map(Structure, ("llama", "mixtral", "qwen3_moe", "gpt_oss", "gpt2", "t5", "bert", "vit", "clip", "llava")))
#: Heads of other tasks on models whose embedding may be tied.
HEADS = tuple(
    Structure(model_type, f"{name}ForSequenceClassification")
    for model_type, name in (
        ("llama", "Llama"),
        ("qwen2", "Qwen2"),
        ("gpt2", "GPT2"),
        ("bert", "Bert"),
        ("roberta", "Roberta"),
        ("mixtral", "Mixtral"),
    )
)


def structures() -> tuple[Structure, ...]:
    """One for each config class of transformers' mapping, in its order, and HEADS."""
    names: dict[str, str] = {}
    for name, kind in CONFIG_MAPPING_NAMES.items():
        if kind not in names or f"{name}config" == kind.lower():  # GPT2Config is gpt2's, and gpt-sw3's too
            names[kind] = name
    taken = set(names.values())
    return (*(Structure(name) for name in CONFIG_MAPPING_NAMES if name in taken), *HEADS)


@dataclass(frozen=True, slots=True)
class Expected:
    """What becomes of a structure that does not come out right, and at which step; `because` begins the reason that is met."""

    outcome: str
    step: str
    because: str


def expected() -> Mapping[str, Expected]:
    """By structure; what is not among them comes out right."""
    return {name: Expected(*row) for name, row in json.loads(EXPECTED.read_text(encoding="utf-8")).items()}
