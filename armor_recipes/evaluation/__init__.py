"""Evaluation: how well a model still predicts text."""

from armor_recipes.evaluation.perplexity import Perplexity, evaluate, evaluation_windows, measure, perplexity

__all__ = ["Perplexity", "evaluate", "evaluation_windows", "measure", "perplexity"]
