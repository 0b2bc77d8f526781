"""Fidelity: how near the compressed model's outputs are to those of the dense one on the same samples.

Of each sample, over all its positions that are no padding, with y of the dense and ŷ of the compressed model:

- cosine: ⟨y, ŷ⟩ / (‖y‖ ‖ŷ‖), and 0 where ŷ = 0;
- relative difference: ‖y − ŷ‖ / ‖y‖;
- of logits, whose last dimension is classes or tokens: the share of positions with equal argmax, and the mean over positions of
  KL(dense ‖ compressed) = Σ_i p_i (log p_i − log q_i) in nats.

Figures are means over samples, and of the divergence the 99th percentile over all positions, too. Sums are float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn

from armor_recipes.calibration.inputs import TOKENS, Batch, InputSet, leading
from armor_recipes.checkpoint.files import save_tensors
from armor_recipes.compute import plain_torch
from armor_recipes.errors import InputError, NumericalError
from armor_recipes.evaluation.contract import Measure, Measurement, Reading, Room, Value
from armor_recipes.evaluation.intervals import bootstrap, bootstrap_quantile, quantile
from armor_recipes.evaluation.outputs import chosen, counted, head_rows, inference, outputs, vocabulary
from armor_recipes.evaluation.perplexity import fitting_batch
from armor_recipes.evaluation.room import check_room
from armor_recipes.model.facts import model_facts
from armor_recipes.model.finite import is_finite
from armor_recipes.recipe.schema import FidelitySpec, Strict

#: Values of one output that are compared at once, in float64: few enough that a core's own cache holds them. 2^22 took 2.5 to 4
#: times as long over vocabularies of 49,152 and 262,144.
_AT_ONCE = 1 << 17
_LOGITS = "logits"


@dataclass(frozen=True, slots=True)
class Likeness:
    """What one sample's outputs have in common; `agreement` and `divergence` of logits alone, and `(P,)` that of each position."""

    cosine: float
    difference: float
    agreement: float | None = None
    divergence: float | None = None
    positions: NDArray[np.float64] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Fidelity(Measure[FidelitySpec]):
    """Fidelity on a set of inputs. The dense model's outputs lie in files meanwhile, in the dtype in which it gave them."""

    name: ClassVar[str] = "fidelity"
    spec_type: ClassVar[type[Strict]] = FidelitySpec
    keeps: ClassVar[bool] = True
    inputs: InputSet
    output: str | None
    batch_size: int

    @classmethod
    def check(cls, model: nn.Module) -> None:
        """Any model has outputs."""

    @classmethod
    def read(cls, spec: FidelitySpec, reading: Reading) -> Self:
        """Choose the samples as for calibration. Raises InputError for one that is nothing but padding."""
        inputs = reading.inputs(spec)
        for name, tensor in (pair for group in inputs.groups for pair in group.items()):
            if name.endswith("attention_mask") and not bool(tensor.flatten(1).any(dim=1).all()):
                raise InputError(f"{inputs.dataset}: a sample's {name} is zero everywhere; remove the sample")
        return cls(inputs, spec.output, spec.batch_size)

    @property
    def sha256(self) -> str:
        """Of the samples."""
        return self.inputs.sha256

    @property
    def tokens(self) -> int:
        """Of all samples."""
        return sum(group[TOKENS].numel() for group in self.inputs.groups if TOKENS in group)

    def dense_bytes(self, model: nn.Module) -> int:
        """Bytes of logits over the vocabulary, or of hidden states, of all tokens; what has no tokens is small."""
        ids = [group.get("decoder_input_ids", group.get(TOKENS)) for group in self.inputs.groups]
        facts = model_facts(model)
        width = head_rows(model) or facts.hidden_size
        return sum(each.numel() * (width or 0) * 4 for each in ids if each is not None)

    @plain_torch()
    def before(self, model: nn.Module, room: Room) -> None:
        """Keep the dense model's outputs. Raises ResourceError where they do not fit on the disk, NumericalError as `after`."""
        done = 0
        with inference(model):
            for place, batch in enumerate(self._batches(model)):
                size = len(leading(batch))
                name, dense = chosen(outputs(model, batch), size, self.output)
                mask = counted(batch, name, dense)
                if not is_finite(dense if mask is None else dense[mask.to(dense.device)]):
                    raise NumericalError(
                        f"{self.inputs.dataset}: {name} of a sample among {done}…{done + size - 1} (from 0) are not finite in the "
                        "dense model"
                    )
                if not place:
                    check_room(room.folder, dense.nbytes // size * len(self.inputs))
                save_tensors({name: dense.contiguous().cpu()}, _file(room.folder, place))
                done += size
                if room.on_progress is not None:
                    room.on_progress(done, len(self.inputs))

    @plain_torch()
    def after(self, model: nn.Module, room: Room) -> Measurement:
        """Compare with what `before` kept."""
        rows: list[Likeness] = []
        name, positions = "", 0
        with inference(model):
            for place, batch in enumerate(self._batches(model)):
                ((name, dense),) = load_file(_file(room.folder, place)).items()
                found = chosen(outputs(model, batch), len(dense), name)[1].cpu()
                mask = counted(batch, name, dense)
                for sample, (wanted, got) in enumerate(zip(dense, found, strict=True)):
                    where = f"{self.inputs.dataset}: sample {len(rows)} (from 0), {name}"
                    pair = matrices(wanted, got, None if mask is None else mask[sample].cpu())
                    rows.append(likeness(*pair, logits=name == _LOGITS and dense.ndim <= 3, where=where))
                    positions += len(pair[0])
                if room.on_progress is not None:
                    room.on_progress(len(rows), len(self.inputs))
        return self._measurement(rows, name, positions)

    def _batches(self, model: nn.Module) -> list[Batch]:
        lengths = [group[TOKENS].shape[1] for group in self.inputs.groups if TOKENS in group]
        if not lengths:
            return self.inputs.batches(self.batch_size)
        return self.inputs.batches(fitting_batch(self.batch_size, max(lengths), vocabulary(model)))

    def _measurement(self, rows: list[Likeness], name: str, positions: int) -> Measurement:
        columns = {
            "cosine": [row.cosine for row in rows],
            "relative_difference": [row.difference for row in rows],
            "top1_agreement": [row.agreement for row in rows if row.agreement is not None],
            "kl_divergence": [row.divergence for row in rows if row.divergence is not None],
        }
        positions_of = [row.positions for row in rows if row.positions is not None]
        return Measurement(
            (
                *(_mean(key, values) for key, values in columns.items() if values),
                *([_high(positions_of)] if positions_of else []),
            ),
            tuple(source.dataset for source in self.inputs.sources),
            len(rows),
            self.sha256,
            {"output": name, "positions": positions},
        )


def _file(folder: Path, place: int) -> Path:
    return folder / f"fidelity-{place:06d}.safetensors"


def _mean(name: str, values: list[float]) -> Value:
    sample = np.array(values, dtype=np.float64)
    return Value(name, float(sample.mean()), bootstrap(sample), ".4g" if name == "kl_divergence" else ".4f")


def _high(positions: list[NDArray[np.float64]]) -> Value:
    """The 99th percentile of KL divergence over all positions; its interval is of samples drawn whole."""
    return Value("kl_divergence_p99", quantile(positions, 0.99), bootstrap_quantile(positions, 0.99), ".4g")


def matrices(dense: Tensor, found: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Two outputs of one sample as `(P, D)`: the counted positions of `(L, D)`, all of `(D,)`, and others as one position."""
    if dense.shape != found.shape:
        raise NumericalError(
            f"the outputs have shapes {tuple(dense.shape)} and {tuple(found.shape)}, which must be equal"
        )
    if dense.ndim == 2:
        return (dense, found) if mask is None else (dense[mask], found[mask])
    return dense.reshape(1, -1), found.reshape(1, -1)


def likeness(dense: Tensor, found: Tensor, *, logits: bool = False, where: str = "the outputs") -> Likeness:
    """Compare two outputs `(P, D)` of one sample. Raises NumericalError for what is not finite, and for a dense output of zeros."""
    sums = torch.zeros(4, dtype=torch.float64)
    equal, rows = 0, []
    for y, x in _pieces(dense, found):
        if not (bool(y.isfinite().all()) and bool(x.isfinite().all())):
            raise NumericalError(f"{where}: not all of the dense and the compressed model's outputs are finite")
        sums += torch.stack([_total(part) for part in (y * y, x * x, y * x, (y - x).square())])
        if logits and y.shape[1] > 1:
            equal += int((y.argmax(-1) == x.argmax(-1)).sum())
            rows.append(divergences(y, x))
    yy, xx, yx, dd = sums.tolist()
    if yy == 0:
        raise NumericalError(
            f"{where}: the dense model's output is zero everywhere, so that nothing can be relative to it"
        )
    cosine = (
        min(1.0, max(-1.0, yx / math.sqrt(yy) / math.sqrt(xx))) if xx > 0 else 0.0
    )  # Cauchy–Schwarz, but for rounding
    if not logits or dense.shape[1] < 2:
        return Likeness(cosine, math.sqrt(dd / yy))
    divergence = sum(float(_total(row[:, None])) for row in rows)
    return Likeness(cosine, math.sqrt(dd / yy), equal / len(dense), divergence / len(dense), torch.cat(rows).numpy())


def divergences(dense: Tensor, found: Tensor) -> Tensor:
    """KL(dense ‖ found) in nats of each row of logits `(P, V)`, float64: at least 0, and 0 where the rows are equal.

    Each term is p·d + q − p with d = log p − log q, which is never negative; where p and q are near, it is p·(d + expm1(−d)), in
    which nothing cancels.
    """
    p, q = (logits.double().log_softmax(-1) for logits in (dense, found))
    d, probabilities = p - q, p.exp()
    near = d.abs() < 1
    terms = torch.where(near, probabilities * (d + torch.expm1(-d.clamp(-1, 1))), probabilities * (d - 1) + q.exp())
    return torch.from_numpy(terms.clamp(min=0).numpy().sum(-1))


def _pieces(dense: Tensor, found: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some positions at a time, in float64."""
    rows = max(1, _AT_ONCE // max(1, dense.shape[1]))
    for y, x in zip(dense.split(rows), found.split(rows), strict=True):
        yield y.double(), x.double()


def _total(values: Tensor) -> Tensor:
    """The sum of `(P, D)`, by numpy: torch's bits would depend on the number of threads."""
    return torch.tensor(float(values.numpy().sum(-1).sum()), dtype=torch.float64)
