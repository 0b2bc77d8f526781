"""Token-level perplexity: exp of the mean negative log-likelihood of the next token.

Of words and bytes it is exp of that mean times the tokens that the text has for each word or byte.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from armor_recipes.calibration.windows import check_vocabulary
from armor_recipes.compute import plain_torch
from armor_recipes.compute.threads import in_order
from armor_recipes.errors import InputError, NumericalError, PlanError
from armor_recipes.evaluation.contract import Measure, OnProgress, Reading, Room, Value
from armor_recipes.evaluation.intervals import bootstrap
from armor_recipes.evaluation.outputs import evaluating, vocabulary
from armor_recipes.evaluation.windows import TextWindows, evaluation_windows
from armor_recipes.model.facts import model_facts
from armor_recipes.model.replay import parameters_of
from armor_recipes.recipe.schema import PerplexitySpec, Strict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Values of logits in one forward pass.
LOGITS_AT_MOST = 1 << 26
#: exp of more is no float64.
_LARGEST = 709


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp(`nll`), with `nll` the mean over `tokens` predicted tokens in nats; `sha256` is the hash of the windows.

    `bos` is what every window begins with. `losses` and `targets` are of each window the sum of its losses and the number of its
    predicted tokens; `tokens_per_word` and `tokens_per_byte` are of the whole text. They are in no manifest.
    """

    value: float
    nll: float
    tokens: int
    windows: int
    dataset: str
    sha256: str
    bos: tuple[int, ...] = ()
    losses: tuple[float, ...] = ()
    targets: tuple[int, ...] = ()
    tokens_per_word: float | None = None
    tokens_per_byte: float | None = None

    @property
    def values(self) -> tuple[Value, ...]:
        """The perplexity of tokens, without an interval: what a run shows."""
        return (Value("perplexity", self.value, form=".3f"),)

    @property
    def figures(self) -> tuple[Value, ...]:
        """Of tokens, words and bytes, with intervals over windows; what is too large for a float64 is left out."""
        each = {"perplexity": 1.0, "word_perplexity": self.tokens_per_word, "byte_perplexity": self.tokens_per_byte}
        spread = bootstrap(np.array(self.losses), weights=np.array(self.targets, dtype=np.float64))
        return tuple(
            Value(name, math.exp(self.nll * n), _exp(spread, n), ".4f")
            for name, n in each.items()
            if n is not None and max((self.nll, *(spread or ()))) * n < _LARGEST
        )

    def against(self, dense: object) -> tuple[Value, ...]:
        """The ratio to the perplexity of another model on the same windows; its interval is of paired windows."""
        if not isinstance(dense, Perplexity) or dense.sha256 != self.sha256 or not self.losses or not dense.losses:
            return ()
        paired = np.array(self.losses) - np.array(dense.losses)
        spread = bootstrap(paired, weights=np.array(self.targets, dtype=np.float64))
        return (Value("perplexity_ratio", self.value / dense.value, _exp(spread, 1.0), ".4f"),)

    @property
    def datasets(self) -> tuple[str, ...]:
        """The text's name."""
        return (self.dataset,)

    @property
    def size(self) -> str:
        """The number of predicted tokens, in words."""
        return f"{self.tokens} tokens"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "perplexity": self.value,
            "nll": self.nll,
            "tokens": self.tokens,
            "windows": self.windows,
            "bos": list(self.bos),
            "sha256": self.sha256,
        }


@dataclass(frozen=True, slots=True, eq=False)
class PerplexityMeasure(Measure[PerplexitySpec]):
    """Perplexity on windows of held-out text."""

    name: ClassVar[str] = "perplexity"
    together: ClassVar[bool] = True
    spec_type: ClassVar[type[Strict]] = PerplexitySpec
    windows: TextWindows

    @classmethod
    def check(cls, model: nn.Module) -> None:
        """Only a model that predicts the next token of a text has a perplexity."""
        reason = why_none(model)
        if reason:
            raise PlanError(
                f"evaluation.perplexity: {type(model).__name__} {reason}, so that it has no perplexity; measure `fidelity` to the "
                "dense model instead"
            )

    @classmethod
    def read(cls, spec: PerplexitySpec, reading: Reading) -> Self:
        """Cut the windows."""
        return cls(evaluation_windows(spec, reading.tokenizer, vocab_size=reading.model.vocabulary))

    @property
    def sha256(self) -> str:
        """Of the windows."""
        return self.windows.sha256

    @property
    def tokens(self) -> int:
        """Of all windows."""
        return self.windows.ids.numel()

    def after(self, model: nn.Module, room: Room) -> Perplexity:
        """Perplexity on the windows."""
        return measure(model, self.windows, on_progress=room.on_progress)


def why_none(model: nn.Module) -> str:
    """Why a model has no perplexity, as the end of a sentence; nothing where it has one."""
    if model_facts(model).encoder_decoder:
        return "writes a target text for a source text"
    if "input_ids" not in parameters_of(model):
        return "reads no tokens"
    if not getattr(model, "can_generate", lambda: True)():
        return "predicts no next token"
    return ""


@plain_torch()
def evaluate(
    model: nn.Module,
    spec: PerplexitySpec,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    batch_size: int = 8,
    on_progress: OnProgress | None = None,
) -> Perplexity:
    """Perplexity of a causal language model on the text that the spec names. Raises InputError and NumericalError."""
    windows = evaluation_windows(spec, tokenizer, vocab_size=vocabulary(model))
    return measure(model, windows, batch_size=batch_size, on_progress=on_progress)


def measure(
    model: nn.Module, windows: TextWindows, *, batch_size: int = 8, on_progress: OnProgress | None = None
) -> Perplexity:
    """Perplexity of a causal language model on given windows. Raises NumericalError if it is not finite."""
    sums = window_losses(model, windows.ids, spans=windows.spans, batch_size=batch_size, on_progress=on_progress)
    targets = windows.targets
    tokens = sum(targets)
    nll = float(sums.sum()) / tokens
    try:
        value = math.exp(nll)
    except OverflowError as error:
        raise NumericalError(
            f"perplexity on {windows.dataset} overflows: the mean loss is {nll:.6g} nats a token"
        ) from error
    return Perplexity(
        value,
        nll,
        tokens,
        len(windows),
        windows.dataset,
        windows.sha256,
        windows.prefix,
        tuple(sums.tolist()),
        targets,
        *windows.tokens_per,
    )


def perplexity(
    model: nn.Module, windows: Tensor, *, batch_size: int = 8, on_progress: OnProgress | None = None
) -> tuple[float, int]:
    """Mean negative log-likelihood in nats over the N·(L−1) targets of windows `(N, L)` int64, and their number.

    Raises as `window_losses` does.
    """
    sums = window_losses(model, windows, batch_size=batch_size, on_progress=on_progress)
    targets = len(sums) * (windows.shape[1] - 1)
    return float(sums.sum()) / targets, targets


@plain_torch()
def window_losses(
    model: nn.Module,
    windows: Tensor,
    *,
    spans: Tensor | None = None,
    batch_size: int = 8,
    on_progress: OnProgress | None = None,
) -> Tensor:
    """Negative log-likelihood in nats of each of the windows `(N, L)` int64, summed over its targets: float64 `(N,)`.

    Targets are the L−1 tokens after the first, or those from `spans[:, 0]` up to `spans[:, 1]`, `(N, 2)` int64.

    The model runs in evaluation mode and gets its own mode back. Logits are taken in float32, their losses summed in
    float64. Raises NumericalError if a window's loss is not finite, InputError if an id is not in the vocabulary.
    """
    count, length = windows.shape
    if count < 1 or length < 2:
        raise InputError(f"perplexity needs at least one window of two tokens; got {count} of {length}")
    vocab_size = vocabulary(model)
    if vocab_size is not None:
        check_vocabulary(windows, vocab_size, "the evaluation text")
    losses: list[Tensor] = []
    device, size = _device(model), fitting_batch(batch_size, length, vocab_size)
    parts = [None] * -(-count // size) if spans is None else torch.split(spans, size)
    batches = list(zip(torch.split(windows, size), parts, strict=True))
    with evaluating(model):
        for found in in_order(partial(_batch_losses, model), batches, on_cpu=device.type == "cpu"):
            losses.append(found)
            if on_progress is not None:
                on_progress(sum(map(len, losses)), count)
    sums = torch.cat(losses).cpu()
    broken = (~sums.isfinite()).nonzero().flatten().tolist()
    if broken:
        raise NumericalError(
            f"the loss is not finite on {len(broken)} of {count} windows, first on window {broken[0]} (from 0)"
        )
    return sums


def fitting_batch(batch_size: int, length: int, vocab_size: int | None) -> int:
    """Windows in one pass: `batch_size`, or as many as keep the logits `(B, L, V)` below 2^26 values (256 MB in float32)."""
    return max(1, min(batch_size, LOGITS_AT_MOST // (length * (vocab_size or 1))))


@torch.inference_mode()
def _batch_losses(model: nn.Module, batch: tuple[Tensor, Tensor | None]) -> Tensor:
    """Sum of the targets' losses of each window `(B,)`, float64; one window at a time, since logits are large."""
    windows, spans = batch
    ids = windows.to(_device(model))
    # A last target is never read: a model may have no place for one token more.
    read = ids if spans is None else ids[:, : int(spans.max()) - 1]
    logits = model(input_ids=read, use_cache=False, return_dict=True).logits
    sums = []
    for place, (row, window) in enumerate(zip(logits, ids, strict=True)):
        first, stop = (1, len(window)) if spans is None else spans[place].tolist()
        targets = window[first:stop].to(row.device)
        sums.append(
            functional.cross_entropy(row[first - 1 : stop - 1].float(), targets, reduction="none").double().sum()
        )
    return torch.stack(sums)


def _exp(spread: tuple[float, float] | None, factor: float) -> tuple[float, float] | None:
    return None if spread is None else (math.exp(spread[0] * factor), math.exp(spread[1] * factor))


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
