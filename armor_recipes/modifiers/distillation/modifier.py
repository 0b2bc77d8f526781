"""`DistillationModifier`: train A, the kept values of S, B and the norms of all layers against the dense model's logits.

Knowledge distillation (Hinton et al., arXiv 1503.02531) on the calibration tokens. It sees what no layer-wise loss sees:
which errors the model's output feels, and which ones later layers can make up for.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from armor_recipes.modifiers.registry import register
from armor_recipes.modifiers.training import RefineConfig, TrainingRefiner, token_sum


class DistillationConfig(RefineConfig):
    """Train all factors against the dense model's next-token probabilities. Masks stay, bytes too."""


@register
class DistillationModifier(TrainingRefiner[DistillationConfig]):
    """Trains the factors of the whole model at the end of a stage. The whole model's activations must fit in memory."""

    config_type = DistillationConfig
    scope: ClassVar[Literal["layer", "model"]] = "model"

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean Kullback-Leibler divergence KL(dense ‖ compressed) a token, in nats, of logits `(B, L, V)`."""
        wanted, found = (torch.log_softmax(logits.float(), dim=-1) for logits in (target, output))
        divergence = functional.kl_div(found, wanted, reduction="none", log_target=True)
        return token_sum(divergence) / (target.shape[0] * target.shape[1])
