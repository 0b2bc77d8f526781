"""Which output layer that has the weight of the embeddings gets one of its own, for what a recipe does to it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from armor_recipes.errors import PlanError
from armor_recipes.model.blocks import find_stacks
from armor_recipes.model.ties import tied_output
from armor_recipes.modifiers.base import AnyModifier
from armor_recipes.plan.targets import Tree, resolve_targets
from armor_recipes.recipe import ModifierConfig, Recipe


def to_untie(recipe: Recipe, model: Any, modifiers: Mapping[str, AnyModifier[Any]]) -> tuple[str, ...]:
    """The output layer where a modifier takes it that unties, as llm-compressor does for those that quantise."""
    name = tied_output(model)
    if name is None or recipe.output.format == "dense" or recipe.is_theirs:
        return ()
    modules = [(one, module) for one, module in model.named_modules(remove_duplicate=False) if one]
    tree = Tree(modules, find_stacks(model))
    for entry in recipe.modifiers:
        if modifiers[entry.key].unties and name in _targeted(tree, entry.config):
            return (name,)
    return ()


def _targeted(tree: Tree, config: ModifierConfig) -> tuple[str, ...]:
    try:
        return resolve_targets(tree, config).names
    except PlanError:  # which is told as the entry is planned
        return ()
