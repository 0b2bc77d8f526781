"""Speed: tokens a second of a prompt, and of decoding one token after the other from its cache.

A turn reads a prompt of random tokens and then writes new ones greedily. The first turn warms up and does not count. Figures are
medians over turns, and in the place of intervals stand the slowest and the fastest turn. No recipe can ask for it: a manifest is a
function of the inputs, and a time is none.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor, nn

from armor_recipes.calibration.inputs import hash_tokens
from armor_recipes.calibration.text import RANDOM_TOKENS
from armor_recipes.compute import plain_torch
from armor_recipes.errors import PlanError
from armor_recipes.evaluation.contract import Measure, Measurement, Reading, Room, Value
from armor_recipes.evaluation.outputs import inference
from armor_recipes.evaluation.perplexity import why_none
from armor_recipes.model.replay import parameters_of
from armor_recipes.recipe.schema import Count, DType, Length, Seed, Strict


class SpeedSpec(Strict):
    """What is timed."""

    prompt_tokens: Length = Field(default=512, title="Prompt", description="Tokens of the prompt.")
    new_tokens: Count = Field(default=64, title="New tokens", description="Tokens written after it.")
    turns: Count = Field(default=5, title="Turns", description="Turns that count.")
    compute_dtype: DType = Field(
        default="auto", title="Dtype", description="Dtype to compute in; `auto` is the stored one."
    )
    seed: Seed = Field(default=0, title="Seed", description="Seed of the prompt.")


@dataclass(frozen=True, slots=True, eq=False)
class Speed(Measure[SpeedSpec]):
    """Timed with a prompt `(1, L)` of token ids."""

    name: ClassVar[str] = "speed"
    spec_type: ClassVar[type[Strict]] = SpeedSpec
    prompt: Tensor
    spec: SpeedSpec

    @classmethod
    def check(cls, model: nn.Module) -> None:
        """Only a model that predicts the next token writes any."""
        reason = why_none(model)
        if reason:
            raise PlanError(f"speed: {type(model).__name__} {reason}, so that it writes no tokens")

    @classmethod
    def read(cls, spec: SpeedSpec, reading: Reading) -> Self:
        """Draw the prompt."""
        generator = torch.Generator().manual_seed(spec.seed)
        return cls(torch.randint(reading.model.vocabulary, (1, spec.prompt_tokens), generator=generator), spec)

    @property
    def sha256(self) -> str:
        """Of the prompt."""
        return hash_tokens(self.prompt)

    @plain_torch()
    def after(self, model: nn.Module, room: Room) -> Measurement:
        """Time all turns."""
        pairs = []
        with inference(model):
            for turn in range(self.spec.turns + 1):
                pairs.append(self._turn(model))
                if room.on_progress is not None:
                    room.on_progress(turn + 1, self.spec.turns + 1)
        prompts, decodes = zip(*pairs[1:], strict=True)
        parameter = next(model.parameters())
        return Measurement(
            (
                _rate("prompt_tokens_per_second", self.spec.prompt_tokens, prompts),
                _rate("decode_tokens_per_second", self.spec.new_tokens, decodes),
            ),
            (RANDOM_TOKENS,),
            self.spec.turns,
            self.sha256,
            {
                "prompt_tokens": self.spec.prompt_tokens,
                "new_tokens": self.spec.new_tokens,
                "threads": torch.get_num_threads(),
                "dtype": str(parameter.dtype).removeprefix("torch."),
            },
        )

    def _turn(self, model: nn.Module) -> tuple[float, float]:
        """Seconds of the prompt up to the first new token, and of the others."""
        device = next(model.parameters()).device
        ids = self.prompt.to(device)
        # Of a prompt a server wants the last position's logits alone.
        last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in parameters_of(model) else {}
        start = _now(device)
        found = model(input_ids=ids, use_cache=True, return_dict=True, **last)
        token, middle = found.logits[:, -1:].argmax(-1), _now(device)
        # transformers 5.24 has another name for it, and warns of the old one.
        name = "cache" if "cache" in parameters_of(model) else "past_key_values"
        for _ in range(self.spec.new_tokens):
            kept = {name: found.past_key_values}
            found = model(input_ids=token, use_cache=True, return_dict=True, **kept)
            token = found.logits[:, -1:].argmax(-1)
        return middle - start, _now(device) - middle


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _rate(name: str, tokens: int, seconds: Sequence[float]) -> Value:
    spread = (tokens / max(seconds), tokens / min(seconds)) if len(seconds) > 1 else None
    return Value(name, tokens / median(seconds), spread, ".1f")
