"""Pure mathematics on tensors: normalisation, 2:4 masks, block-diagonal products, and the solvers behind `factorize`."""

from armor_recipes.solver.entry import factorize, nowag_mask
from armor_recipes.solver.normalize import relative_error, relative_loss
from armor_recipes.solver.result import Factorization, StopReason
from armor_recipes.solver.trainable import TrainableFactors, TrainableLinear

__all__ = [
    "Factorization",
    "StopReason",
    "TrainableFactors",
    "TrainableLinear",
    "factorize",
    "nowag_mask",
    "relative_error",
    "relative_loss",
]
