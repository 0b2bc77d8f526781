"""`DistillationModifier`: train A, B and the norms of all layers (S too on request) against the dense model.

Knowledge distillation (Hinton et al., arXiv 1503.02531) on the calibration tokens. It sees what no layer-wise loss sees:
which errors the model's output feels, and which ones later layers can make up for. Beside the logits, the hidden states of
the layers are matched (as in FitNets, arXiv 1412.6550): they say more about each token than its logits do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from armor_recipes.modifiers.kinds.refiner import RefineUnit, UnitOutput
from armor_recipes.modifiers.registry import register
from armor_recipes.modifiers.training import RefineConfig, TrainingRefiner, learning_rate_field

#: Probabilities that are made at once, by the kind of device. A CPU is three to four times as fast where they stay in its cache.
_AT_ONCE = {"cpu": 1 << 19}
_AT_ONCE_ELSEWHERE = 1 << 24


class DistillationConfig(RefineConfig):
    """Train all factors against the dense model's next-token probabilities and hidden states. Masks stay, bytes too."""

    learning_rate: float = learning_rate_field(6e-4)
    hidden_layers: Annotated[int, Field(strict=True, ge=0)] | Literal["all"] = Field(
        default="all",
        title="Hidden layers",
        description="Decoder layers whose outputs are compared too: all, or so many, evenly spread; 0 compares logits alone.",
    )
    hidden_weight: Annotated[float, Field(gt=0)] = Field(
        default=5.0,
        title="Weight of hidden states",
        description="Of the mean of ln(1 + their relative squared error), in the sum with the divergence of the logits in nats.",
    )
    logit_stride: Annotated[int, Field(strict=True, ge=1)] | Literal["auto"] = Field(
        default="auto",
        title="Stride of logits",
        description="Logits are compared at every so-many-th token of a window, hidden states at all of them. `auto`: 1, or where "
        "a vocabulary is so large that its logits cost more than the layers, as many as make them cost no more.",
    )
    compute_dtype: Literal["auto", "bfloat16", "float32"] = Field(
        default="auto",
        title="Compute dtype",
        description="Dtype of the passes of both models; what is trained is float32. `auto` is bfloat16 where the device has "
        "instructions for its products, else `model.compute_dtype`. The manifest says what it was.",
    )


@register
class DistillationModifier(TrainingRefiner[DistillationConfig]):
    """Trains the factors of the whole model at the end of a stage, beside the dense one, whose weights are kept for that."""

    config_type = DistillationConfig
    scope: ClassVar[Literal["layer", "model"]] = "model"

    def hidden_layers(self, total: int) -> tuple[int, ...]:
        """Evenly spread, the last layer among them; all where the config asks for all or for more than there are."""
        asked = self.config.hidden_layers
        count = total if asked == "all" else min(asked, total)
        return tuple((i + 1) * total // count - 1 for i in range(count))

    def logit_stride(self, unit: RefineUnit) -> int:
        """As the config asks; `auto` is 1 unless the vocabulary's matrix has more numbers than the modules that are trained."""
        if self.config.logit_stride != "auto":
            return self.config.logit_stride
        return max(1, -(-unit.head // sum(m.d_out * m.d_in for m in unit.modules)))

    def compute_dtype(self, parameter: Tensor) -> torch.dtype:
        """As the config asks; `auto` is bfloat16 where the parameter's device multiplies it in hardware, else its dtype."""
        if self.config.compute_dtype != "auto":
            return torch.bfloat16 if self.config.compute_dtype == "bfloat16" else torch.float32
        return torch.bfloat16 if multiplies_bfloat16(parameter.device) else parameter.dtype

    def loss(self, found: UnitOutput, wanted: UnitOutput) -> Tensor:
        """Mean KL(dense ‖ compressed) a token, in nats, of logits `(B, L, V)`, plus the hidden states' error times its weight.

        Of a model without logits its output's error takes the divergence's place.
        """
        divergence = (
            _divergence(found.output, wanted.output) if wanted.logits else relative_error(found.output, wanted.output)
        )
        if not wanted.hidden:
            return divergence
        errors = [relative_error(*pair) for pair in zip(found.hidden, wanted.hidden, strict=True)]
        return divergence + self.config.hidden_weight * torch.stack(errors).mean()


def _divergence(found: Tensor, wanted: Tensor) -> Tensor:
    total: Tensor = _Divergence.apply(found.flatten(0, -2), wanted.flatten(0, -2))  # type: ignore[no-untyped-call]
    return total


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16 numbers; a CPU without them is slower than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch does not tell
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def relative_error(found: Tensor, wanted: Tensor) -> Tensor:
    """ln(1 + e), averaged over tokens, of e = ‖found − wanted‖² / ‖wanted‖² of hidden states `(B, L, H)`.

    Each token by itself: a few tokens carry activations so large that they would own a common sum. And of its logarithm (the
    Cauchy loss, arXiv 1701.03077), which is e where that is small: a token at which only the compressed model has such
    activations has an e of hundreds, and with it a gradient hundreds of times as long as all others together.
    """
    target = wanted.float()
    return torch.log1p((found.float() - target).square().sum(-1) / target.square().sum(-1)).mean()


class _Divergence(torch.autograd.Function):
    """Mean over rows of KL(softmax(wanted) ‖ softmax(found)), both `(T, V)`, differentiable in the first.

    Row by row its gradient is softmax(found) − softmax(wanted): it is made along the way, a few rows at a time, and is all
    that is kept.
    """

    @staticmethod
    def forward(ctx: Any, found: Tensor, wanted: Tensor) -> Tensor:
        gradient = torch.empty_like(found)
        total = torch.zeros((), dtype=torch.float64, device=found.device)
        at_once = max(1, _AT_ONCE.get(found.device.type, _AT_ONCE_ELSEWHERE) // found.shape[1])
        for rows, targets, out in zip(*(x.split(at_once) for x in (found, wanted, gradient)), strict=True):
            ours, theirs = (functional.log_softmax(part.float(), dim=-1) for part in (rows, targets))
            expected = theirs.exp()
            total += torch.sum(expected * (theirs - ours), dim=-1).sum(dtype=torch.float64)
            out.copy_((ours.exp_() - expected) / len(found))
        ctx.save_for_backward(gradient)
        return total.float() / len(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * gradients[0], None
