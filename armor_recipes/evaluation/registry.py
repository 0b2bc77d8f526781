"""Every measure, in the order in which they are taken and shown; each is a key of the recipe's `evaluation`."""

from __future__ import annotations

from typing import Any

from armor_recipes.evaluation.classification import Classification
from armor_recipes.evaluation.contract import Measure
from armor_recipes.evaluation.fidelity import Fidelity
from armor_recipes.evaluation.multiple_choice import MultipleChoice
from armor_recipes.evaluation.perplexity import PerplexityMeasure
from armor_recipes.evaluation.retrieval import Retrieval
from armor_recipes.recipe.schema import EvaluationSpec

MEASURES: tuple[type[Measure[Any]], ...] = (PerplexityMeasure, Fidelity, Classification, Retrieval, MultipleChoice)


def asked(evaluation: EvaluationSpec | None) -> list[tuple[type[Measure[Any]], Any]]:
    """The measures that a recipe asks for, each with its section; a bound on logits has a model without any refused at once."""
    specs = {} if evaluation is None else dict(evaluation.measures)
    if evaluation is not None and evaluation.max_kl_divergence is not None:
        specs["fidelity"] = specs["fidelity"].model_copy(update={"output": "logits"})
    return [(measure, specs[measure.name]) for measure in MEASURES if measure.name in specs]
