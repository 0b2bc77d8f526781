"""What of a model's output says what it makes of its inputs: logits where there are any."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from armor_recipes.errors import PlanError

_LOGITS, _EMBEDDINGS = "logits", "_embeds"


@dataclass(frozen=True, slots=True)
class MainOutput:
    """The tensors that count, with their names; `logits` says that there is one, of unnormalised log-probabilities.

    Of a model without logits they are all `*_embeds` that it gives (CLIP's), else its first tensor (hidden states `(B, L, H)`).
    """

    names: tuple[str, ...]
    tensors: tuple[Tensor, ...]

    @property
    def logits(self) -> bool:
        """Whether it is logits."""
        return self.names == (_LOGITS,)


def main_output(output: Any) -> MainOutput:
    """What counts of what a model gives. Raises PlanError where there is no tensor in it."""
    logits = getattr(output, _LOGITS, None)
    if isinstance(logits, Tensor):
        return MainOutput((_LOGITS,), (logits,))
    named = _named(output)
    embeddings = {name: tensor for name, tensor in named.items() if name.endswith(_EMBEDDINGS)}
    found = embeddings or dict([*named.items()][:1])
    if not found:
        raise PlanError(
            f"the model gives a {type(output).__name__} without a tensor of real numbers: there is nothing to compare"
        )
    return MainOutput(tuple(found), tuple(found.values()))


def _named(output: Any) -> dict[str, Tensor]:
    items = (
        output.items()
        if isinstance(output, Mapping)
        else enumerate(output if isinstance(output, (tuple, list)) else (output,))
    )
    return {
        str(name): value
        for name, value in items
        if isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
    }
