"""`BlockRefineModifier`: layer by layer, train A, the kept values of S, B and the norms against the dense layer's output.

The layer reads what the model as compressed so far gives it, and aims at what the dense model's layer gives. 3BASiL
(arXiv 2603.01376) calls the like of it transformer matching.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import Tensor

from armor_recipes.modifiers.kinds.refiner import UnitOutput
from armor_recipes.modifiers.registry import register
from armor_recipes.modifiers.training import RefineConfig, TrainingRefiner


class BlockRefineConfig(RefineConfig):
    """Train the factors of each decoder layer against the dense layer's output. Masks stay, bytes too."""


@register
class BlockRefineModifier(TrainingRefiner[BlockRefineConfig]):
    """Trains a decoder layer's factors, right after its modules were factorised."""

    config_type = BlockRefineConfig
    scope: ClassVar[Literal["layer", "model"]] = "layer"

    def loss(self, found: UnitOutput, wanted: UnitOutput) -> Tensor:
        """Squared error of the hidden states `(B, L, H)` relative to the target's square."""
        target = wanted.output.float()
        return (found.output.float() - target).square().sum() / target.square().sum()

    def weight(self, wanted: UnitOutput) -> float:
        """The target's square: summed over windows before one is divided by the other, errors are relative to the batch's."""
        return float(wanted.output.float().square().sum())
