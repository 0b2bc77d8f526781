"""Token-level perplexity: exp of the mean negative log-likelihood of the next token.

Windows are contiguous, L tokens each, without overlap; each predicts its L−1 tokens after the first, and begins with the
special tokens that the tokenizer puts before a text. The tail of the text is dropped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from armor_recipes.calibration.encoding import encode
from armor_recipes.calibration.inputs import TOKENS, InputSet, Source, hash_tokens
from armor_recipes.calibration.text import load_documents
from armor_recipes.calibration.windows import check_vocabulary, pack, window_prefix, with_prefix
from armor_recipes.compute import plain_torch
from armor_recipes.compute.threads import in_order
from armor_recipes.errors import InputError, NumericalError, PlanError
from armor_recipes.evaluation.contract import Measure, OnProgress, Reading, Room, Value
from armor_recipes.evaluation.outputs import evaluating, vocabulary
from armor_recipes.model.facts import model_facts
from armor_recipes.model.replay import parameters_of
from armor_recipes.recipe.schema import PerplexitySpec, Strict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Values of logits in one forward pass.
LOGITS_AT_MOST = 1 << 26


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp(`nll`), with `nll` the mean over `tokens` predicted tokens in nats; `sha256` is the hash of the windows.

    `bos` is what every window begins with.
    """

    value: float
    nll: float
    tokens: int
    windows: int
    dataset: str
    sha256: str
    bos: tuple[int, ...] = ()

    @property
    def values(self) -> tuple[Value, ...]:
        """The perplexity, which has no interval here."""
        return (Value("perplexity", self.value, form=".3f"),)

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
    windows: InputSet

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


def evaluation_windows(
    spec: PerplexitySpec, tokenizer: PreTrainedTokenizerBase | None, *, vocab_size: int | None = None
) -> InputSet:
    """Cut the first `spec.windows` windows (None: all) from the text: its rows, empty ones too, joined by blank lines.

    Each begins with what `spec.bos` says. Raises InputError if the dataset cannot be read or is too short, or has an id that
    is not below `vocab_size`.
    """
    text, documents, empty = _joined(spec)
    length = spec.sequence_length
    prefix = window_prefix(spec.bos, tokenizer, length=length, vocab_size=vocab_size)
    stream = encode([text], tokenizer, end=False, prefix=prefix)
    if vocab_size is not None:
        check_vocabulary(stream, vocab_size, spec.dataset)
    packed = pack(stream, length - len(prefix))
    asked = max(1, len(packed)) if spec.windows is None else spec.windows
    if len(packed) < asked:
        raise InputError(
            f"{spec.dataset} has {len(packed)} windows of {length} tokens ({len(stream)} tokens), but "
            f"{asked} are needed to measure perplexity; name more text, a smaller `sequence_length` or fewer `windows`"
        )
    ids = with_prefix(packed[:asked].clone(), prefix, length)
    source = Source(spec.dataset, documents, empty, len(stream), len(packed), len(ids))
    return InputSet({TOKENS: ids}, hash_tokens(ids), asked, (source,), (0,) * asked, prefix)


def _joined(spec: PerplexitySpec) -> tuple[str, int, int]:
    """The text, and how many of its rows have some and are empty; the rows themselves are not kept."""
    found = load_documents(spec.dataset, split=spec.split, text_column=spec.text_column)
    return "\n\n".join(found.rows), len(found.documents), found.empty


def measure(
    model: nn.Module, windows: InputSet, *, batch_size: int = 8, on_progress: OnProgress | None = None
) -> Perplexity:
    """Perplexity of a causal language model on given windows. Raises NumericalError if it is not finite."""
    nll, tokens = perplexity(model, windows.ids, batch_size=batch_size, on_progress=on_progress)
    try:
        value = math.exp(nll)
    except OverflowError as error:
        raise NumericalError(
            f"perplexity on {windows.dataset} overflows: the mean loss is {nll:.6g} nats a token"
        ) from error
    return Perplexity(value, nll, tokens, len(windows), windows.dataset, windows.sha256, windows.prefix)


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
    model: nn.Module, windows: Tensor, *, batch_size: int = 8, on_progress: OnProgress | None = None
) -> Tensor:
    """Negative log-likelihood in nats of each of the windows `(N, L)` int64, summed over its L−1 targets: float64 `(N,)`.

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
    device, batches = _device(model), torch.split(windows, fitting_batch(batch_size, length, vocab_size))
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
def _batch_losses(model: nn.Module, windows: Tensor) -> Tensor:
    """Sum of the targets' losses of each window `(B,)`, float64; one window at a time, since logits are large."""
    ids = windows.to(_device(model))
    logits = model(input_ids=ids, use_cache=False, return_dict=True).logits
    sums = []
    for row, window in zip(logits, ids, strict=True):
        losses = functional.cross_entropy(row[:-1].float(), window[1:].to(row.device), reduction="none")
        sums.append(losses.double().sum())
    return torch.stack(sums)


def _device(model: nn.Module) -> torch.device:
    parameter = next(model.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device
