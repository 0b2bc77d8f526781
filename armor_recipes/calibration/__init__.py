"""Calibration: documents from datasets, windows of tokens from documents, and statistics of activations."""

from armor_recipes.calibration.inputs import InputSet, Source
from armor_recipes.calibration.split import GramMoments, SplitGram
from armor_recipes.calibration.state import StatisticState
from armor_recipes.calibration.statistics import InputGram, InputSecondMoment
from armor_recipes.calibration.text import Documents, load_documents
from armor_recipes.calibration.tokens import build_tokens

__all__ = [
    "Documents",
    "GramMoments",
    "InputGram",
    "InputSecondMoment",
    "InputSet",
    "Source",
    "SplitGram",
    "StatisticState",
    "build_tokens",
    "load_documents",
]
