"""Evaluation: what a model still does as before."""

from armor_recipes.evaluation.contract import Evaluation, Measure, Measured, Measurement, Reading, Room, Value
from armor_recipes.evaluation.perplexity import Perplexity, evaluate, measure, perplexity
from armor_recipes.evaluation.registry import MEASURES, asked
from armor_recipes.evaluation.windows import evaluation_windows

__all__ = [
    "MEASURES",
    "Evaluation",
    "Measure",
    "Measured",
    "Measurement",
    "Perplexity",
    "Reading",
    "Room",
    "Value",
    "asked",
    "evaluate",
    "evaluation_windows",
    "measure",
    "perplexity",
]
