"""Calibration: documents from datasets, windows of tokens from documents, and statistics of activations."""

from armor_recipes.calibration.statistics import InputGram, InputSecondMoment, SplitGram
from armor_recipes.calibration.text import Documents, load_documents
from armor_recipes.calibration.tokens import Source, TokenSet, build_tokens

__all__ = [
    "Documents",
    "InputGram",
    "InputSecondMoment",
    "Source",
    "SplitGram",
    "TokenSet",
    "build_tokens",
    "load_documents",
]
