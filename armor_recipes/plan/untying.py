"""Which output layer a recipe quantises that has the weight of the embeddings, so that it gets one of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from armor_recipes.errors import PlanError
from armor_recipes.model.blocks import find_stacks
from armor_recipes.model.ties import tied_output
from armor_recipes.modifiers.base import AnyModifier
from armor_recipes.modifiers.kinds.quantizer import Quantizer
from armor_recipes.plan.targets import Tree, resolve_targets
from armor_recipes.recipe import ModifierConfig, Recipe


def to_untie(recipe: Recipe, model: Any, modifiers: Mapping[str, AnyModifier[Any]]) -> tuple[str, ...]:
    """The output layer where a quantiser targets it, as llm-compressor unties it then; not where `unfit: skip` leaves it out."""
    name = tied_output(model)
    if name is None or recipe.output.format == "dense" or recipe.is_theirs:
        return ()
    modules = [(one, module) for one, module in model.named_modules(remove_duplicate=False) if one]
    tree = Tree(modules, find_stacks(model))
    for entry in recipe.modifiers:
        modifier = modifiers[entry.key]
        takes = isinstance(modifier, Quantizer) and modifier.takes_modules and entry.config.unfit != "skip"
        if takes and name in _targeted(tree, entry.config):
            return (name,)
    return ()


def _targeted(tree: Tree, config: ModifierConfig) -> tuple[str, ...]:
    try:
        return resolve_targets(tree, config).names
    except PlanError:  # which is told as the entry is planned
        return ()
