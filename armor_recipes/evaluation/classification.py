"""Accuracy on labelled samples: the class with the largest logit against the label."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from armor_recipes.calibration.pools import tensors_path
from armor_recipes.calibration.tensors import LABELS, check_arguments, check_values, load_tensors
from armor_recipes.compute import plain_torch
from armor_recipes.errors import InputError, NumericalError, PlanError
from armor_recipes.evaluation.contract import Measure, Measurement, Reading, Room, Value
from armor_recipes.evaluation.images import labelled, read_pictures
from armor_recipes.evaluation.intervals import wilson
from armor_recipes.evaluation.outputs import inference, outputs
from armor_recipes.evaluation.samples import Rows, Samples, Texts, hash_with, label_of, table, text_of, tokenised
from armor_recipes.recipe.schema import ClassificationSpec, Strict

_CLASSIFIER = re.compile("For(?!Token)[A-Za-z]*Classification")
#: Top 5 says something of more classes than these.
_FEW_CLASSES = 5


@dataclass(frozen=True, slots=True, eq=False)
class Classification(Measure[ClassificationSpec]):
    """Top-1 and top-5 accuracy; `labels` `(N,)` int64 are those of the samples."""

    name: ClassVar[str] = "classification"
    spec_type: ClassVar[type[Strict]] = ClassificationSpec
    samples: Samples
    labels: Tensor
    dataset: str
    batch_size: int
    cut: int

    @classmethod
    def check(cls, model: nn.Module) -> None:
        """Only a model with a classification head has classes."""
        if not _CLASSIFIER.search(type(model).__name__):
            raise PlanError(
                f"evaluation.classification: {type(model).__name__} has no classification head, so that there is no class to "
                "compare with a label; give a model of a class such as …ForSequenceClassification or …ForImageClassification"
            )

    @classmethod
    def read(cls, spec: ClassificationSpec, reading: Reading) -> Self:
        """Read samples and labels."""
        path = tensors_path(spec.dataset)
        if path is not None and spec.image_column is None:
            rows, labels = _from_tensors(spec, path, reading)
            return cls(rows, labels, spec.dataset, spec.batch_size, 0)
        if spec.image_column is not None:
            return cls._of_images(spec, spec.image_column, reading)
        columns = ((spec.text_column, "text_column"), (spec.label_column or "label", "label_column"))
        pairs = table(spec.dataset, spec.split, columns, spec.samples)
        texts = tokenised(
            [text_of(cell, "text_column") for cell, _ in pairs],
            reading,
            length=spec.sequence_length,
            dataset=spec.dataset,
        )
        assert reading.tokenizer is not None
        # Without a padding token a classifier finds the last token of single texts only.
        size = spec.batch_size if reading.tokenizer.pad_token_id is not None else 1
        labels = torch.tensor([label_of(mark, reading) for _, mark in pairs])
        return cls(texts, labels, spec.dataset, size, texts.cut)

    @property
    def sha256(self) -> str:
        """Of the samples and their labels."""
        return hash_with(self.samples.hash(), *self.labels.tolist())

    @classmethod
    def _of_images(cls, spec: ClassificationSpec, image_column: str, reading: Reading) -> Self:
        rows = labelled(spec, image_column, reading)
        pictures = read_pictures([picture for picture, _ in rows], reading, spec.dataset)
        return cls(pictures, torch.tensor([label for _, label in rows]), spec.dataset, spec.batch_size, 0)

    @plain_torch()
    def after(self, model: nn.Module, room: Room) -> Measurement:
        """Rank every label among the classes."""
        ranks = torch.zeros(len(self.samples), dtype=torch.int64)
        classes, done = 0, 0
        with inference(model):
            for places, batch in self.samples.batches(self.batch_size):
                logits = self._logits(model, batch, places)
                ranks[places] = ranks_of(logits, self.labels[places])
                classes, done = logits.shape[1], done + len(places)
                if room.on_progress is not None:
                    room.on_progress(done, len(self.samples))
        tops = (1, 5) if classes > _FEW_CLASSES else (1,)
        return Measurement(
            tuple(rate(f"top{k}_accuracy", int((ranks <= k).sum()), len(ranks)) for k in tops),
            (self.dataset,),
            len(ranks),
            self.sha256,
            {"classes": classes, "texts_cut": self.cut} if isinstance(self.samples, Texts) else {"classes": classes},
            {f"top{k}_accuracy": tuple((ranks <= k).double().tolist()) for k in tops},
        )

    def _logits(self, model: nn.Module, batch: object, places: Sequence[int]) -> Tensor:
        logits = outputs(model, batch).get("logits")  # type: ignore[arg-type]
        if logits is None or logits.ndim != 2 or len(logits) != len(places):
            shape = "none" if logits is None else tuple(logits.shape)
            raise InputError(f"{type(model).__name__} gives no logits of classes for each sample (shape {shape})")
        if not bool(logits.isfinite().all()):
            raise NumericalError(f"{self.dataset}: logits of a sample among {places[0]}…{places[-1]} are not finite")
        return logits.float().cpu()


def ranks_of(logits: Tensor, labels: Tensor) -> Tensor:
    """The place, from 1, of each label `(N,)` among the logits `(N, C)` of its row; equal logits count as before it."""
    own = logits.gather(1, labels[:, None])
    return (logits >= own).sum(1)


def rate(name: str, hits: int, count: int) -> Value:
    """A rate with Wilson's interval."""
    return Value(name, hits / count, wilson(hits, count))


def _from_tensors(spec: ClassificationSpec, path: Path, reading: Reading) -> tuple[Rows, Tensor]:
    """The first samples of files of tensors, and their labels. Raises InputError."""
    files, name = load_tensors(spec.dataset, path), spec.label_column or LABELS
    names = [each for each in files.names if each != name]
    if name not in files.names:
        raise InputError(f"{spec.dataset} has no tensor {name!r}; set `label_column` to one of: {', '.join(names)}")
    check_arguments(names, reading.model, spec.dataset)
    count = len(files) if spec.samples is None else spec.samples
    if count > len(files):
        raise InputError(f"{spec.dataset} has {len(files)} samples, but {count} are asked for; lower `samples`")
    tensors = dict(files.rows(range(count)))
    labels = tensors.pop(name)
    if not tensors or labels.ndim != 1 or labels.dtype.is_floating_point or labels.dtype == torch.bool:
        raise InputError(
            f"{spec.dataset}: {name} is {tuple(labels.shape)} {labels.dtype}, beside {len(tensors)} tensors; it must hold a whole "
            "number for each sample, beside the model's inputs"
        )
    check_values(tensors, reading.model, spec.dataset)
    classes = len(reading.labels)
    if not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise InputError(
            f"{spec.dataset}: {name} holds {int(labels.min())} to {int(labels.max())}; the classes are 0 to {classes - 1}"
        )
    return Rows(tensors), labels.long()
