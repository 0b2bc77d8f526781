"""A corpus of recipes in llm-compressor's shapes: how many plan here, and what all others are told is missing."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from armor_recipes.errors import PlanError, RecipeError
from armor_recipes.integrations.models import ModelSource, meta_model, open_model
from armor_recipes.modifiers import config_types, modifiers
from armor_recipes.recipe import convert_recipe, load_recipe
from armor_recipes.recipe.llmcompressor import FIELDS, MODIFIERS, RENAMED
from armor_recipes.recipe.schema import ModelSpec
from armor_recipes.run.planning import planned
from tests.support.corpus import CORPUS, PLAIN, save_tiny

#: How many of them plan at least: it grows as modifiers and fields land.
PLAN = 110
#: What a recipe may be told is missing: a modifier of llm-compressor, a field that only it has, or one of older releases, or what
#: a field asks for that is not here. Plain layers, too, while they are not quantised.
PLAIN_LAYERS = "no modifier before it makes 2:4 factors for"
#: Fields that any refusal may name, because it says how to mend them.
EVERYWHERE = {"targets", "ignore", "scheme", "config_groups"}
#: Where llm-compressor is installed they say why it cannot run the modifier as a step.
MODIFIER = re.compile(
    r"llm-compressor has (\w+), (which is not here: install `armor-recipes\[llmcompressor\]`|which|and)"
)
RENAMED_KIND = re.compile(r"llm-compressor has renamed (\w+): write \w+")
FIELD = re.compile(r"\.(\w+): \w+ here has no such field; ")


@dataclass(frozen=True, slots=True)
class Tiny:
    """A model of one architecture, on the meta device."""

    source: ModelSource
    model: PreTrainedModel


class Models:
    """Tiny models by their architectures, each made when a recipe first asks for it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: dict[str, Tiny] = {}

    def __getitem__(self, name: str) -> Tiny:
        if name not in self._made:
            spec = ModelSpec(id=str(save_tiny(name, self._folder / name)))
            source = open_model(spec, device=torch.device("cpu"))
            self._made[name] = Tiny(source, meta_model(source))
        return self._made[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("tiny"))


def outcome(item: dict[str, str], tiny: Tiny, folder: Path) -> str:
    """Nothing where the recipe plans, else what it is told. Python goes through `armor convert`."""
    path = folder / f"recipe.{item['form']}"
    path.write_text(item["text"], encoding="utf-8")
    try:
        if item["form"] == "py":
            text = convert_recipe(path, registry=config_types()).yaml
            path = folder / "converted.yaml"
            path.write_text(text, encoding="utf-8")
        given = [f"model.id={tiny.source.location}", "calibration.dataset=builtin:random-tokens", "output.path=out"]
        recipe = load_recipe([path], registry=config_types(), overrides=given)
        known = modifiers()
        instances = {entry.key: known[entry.kind](entry.config) for entry in recipe.modifiers}
        planned(recipe, tiny.source, tiny.model, instances)
    except (RecipeError, PlanError) as error:
        return str(error)
    return ""


def misnamed(message: str, text: str) -> Iterator[str]:
    """Lines of a refusal that do not name what is missing, or name what is not in the recipe or not missing."""
    known = modifiers()
    fields = {*FIELDS, *(name for one in MODIFIERS.values() for name in one.fields)}
    asked = {name for name in fields - EVERYWHERE if name in text}
    lines = message.splitlines()
    for line in lines:
        modifier, field, renamed = MODIFIER.search(line), FIELD.search(line), RENAMED_KIND.search(line)
        if modifier is not None:
            true = modifier[1] in MODIFIERS and modifier[1] not in known and modifier[1] in text
        elif renamed is not None:
            true = renamed[1] in RENAMED and renamed[1] in text
        elif field is not None:
            true = field[1] in fields and field[1] in text
        else:
            beside = ".targets: required, but missing" in line and len(lines) > 1
            true = beside or PLAIN_LAYERS in line or any(name in line for name in asked)
        if not true:
            yield line


def test_recipes_of_the_corpus_plan_or_are_told_the_true_name(models: Models, tmp_path: Path) -> None:
    told = [outcome(item, models[item.get("model", PLAIN)], tmp_path) for item in CORPUS]
    wrong = [line for item, message in zip(CORPUS, told, strict=True) for line in misnamed(message, item["text"])]
    assert not wrong
    count = sum(not message for message in told)
    assert count >= PLAN, f"{count} of {len(CORPUS)} plan"


def test_the_corpus_is_weighted_as_recipes_are() -> None:
    text = "\n".join(item["text"] for item in CORPUS)
    counts = {name: sum(f"{name}" in item["text"] for item in CORPUS) for name in MODIFIERS}
    assert len(CORPUS) >= 100
    assert sorted(counts, key=lambda name: -counts[name])[:4] == [
        "QuantizationModifier",
        "GPTQModifier",
        "AWQModifier",
        "AutoRoundModifier",
    ]
    for part in ("W4A16", "NVFP4", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4", "MXFP8", "kv_cache_scheme", "config_groups"):
        assert part in text
