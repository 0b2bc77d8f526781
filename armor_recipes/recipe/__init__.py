"""The recipe: what a user may write, how files compose, and what is said when something is wrong."""

from armor_recipes.recipe.composition import builtin_recipes
from armor_recipes.recipe.conversion import Converted, convert_recipe
from armor_recipes.recipe.json_schema import json_schema
from armor_recipes.recipe.loading import load_recipe, load_recipe_mapping, load_section
from armor_recipes.recipe.recipe import ModifierEntry, Recipe
from armor_recipes.recipe.reference import reference_markdown
from armor_recipes.recipe.schema import (
    AtMost,
    CalibrationSpec,
    ClassificationSpec,
    EvaluationSpec,
    FidelitySpec,
    ModelSpec,
    ModifierConfig,
    MoeSpec,
    MultipleChoiceSpec,
    OutputSpec,
    PerplexitySpec,
    RetrievalSpec,
    ServeSpec,
    WeightedDataset,
)

__all__ = [
    "AtMost",
    "CalibrationSpec",
    "ClassificationSpec",
    "Converted",
    "EvaluationSpec",
    "FidelitySpec",
    "ModelSpec",
    "ModifierConfig",
    "ModifierEntry",
    "MoeSpec",
    "MultipleChoiceSpec",
    "OutputSpec",
    "PerplexitySpec",
    "Recipe",
    "RetrievalSpec",
    "ServeSpec",
    "WeightedDataset",
    "builtin_recipes",
    "convert_recipe",
    "json_schema",
    "load_recipe",
    "load_recipe_mapping",
    "load_section",
    "reference_markdown",
]
