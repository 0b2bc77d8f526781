"""What a measure is: it reads its data, looks at the dense model, and measures the compressed one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
from torch import nn

from armor_recipes.calibration.inputs import InputSet, ModelInputs
from armor_recipes.evaluation.intervals import bootstrap
from armor_recipes.recipe.schema import InputsSpec, Strict

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SpecT = TypeVar("SpecT", bound=Strict)
#: Called after each batch with (samples done, samples in all).
OnProgress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Value:
    """One figure: a mean or a rate over samples, with its 95 % interval; None where one sample has none."""

    name: str
    value: float
    interval: tuple[float, float] | None = None
    form: str = ".4f"

    def text(self) -> str:
        """As tables show it: `0.9123 [0.8990, 0.9241]`."""
        if self.interval is None:
            return format(self.value, self.form)
        low, high = (format(bound, self.form) for bound in self.interval)
        return f"{self.value:{self.form}} [{low}, {high}]"

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {"value": self.value, "interval": None if self.interval is None else list(self.interval)}


class Measured(Protocol):
    """What was measured of one model, on which data."""

    @property
    def values(self) -> tuple[Value, ...]:
        """The figures, in the order in which they are shown."""

    @property
    def datasets(self) -> tuple[str, ...]:
        """What it was measured on, as the recipe names it."""

    @property
    def size(self) -> str:
        """How much of that, in words: `128 samples`."""

    @property
    def figures(self) -> tuple[Value, ...]:
        """The `values` and what is told besides where there is room, each with its interval."""

    def against(self, dense: object) -> tuple[Value, ...]:
        """What differs from the same measure of another model on the same samples, with intervals of paired samples."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data that is a function of the inputs and names no place of this machine."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """Figures of one model on `samples` samples; `sha256` is the hash of those, `details` what else there is to say, in order.

    `rows` are of some figures the samples' own values, of which they are the means; they are in no manifest.
    """

    values: tuple[Value, ...]
    datasets: tuple[str, ...]
    samples: int
    sha256: str
    details: Mapping[str, int | str] = field(default_factory=dict)
    rows: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def figures(self) -> tuple[Value, ...]:
        """The values."""
        return self.values

    def against(self, dense: object) -> tuple[Value, ...]:
        """Of each figure that has `rows` in both the difference to that of the same samples."""
        if not isinstance(dense, Measurement) or dense.sha256 != self.sha256:
            return ()
        both = [name for name in self.rows if name in dense.rows]
        pairs = {name: np.array(self.rows[name]) - np.array(dense.rows[name]) for name in both}
        return tuple(Value(f"{name}_difference", float(row.mean()), bootstrap(row)) for name, row in pairs.items())

    @property
    def size(self) -> str:
        """The number of samples, and the details, in words."""
        said = [f"{name.replace('_', ' ')} {value}" for name, value in self.details.items() if value]
        return f"{self.samples} samples" + (f" ({', '.join(said)})" if said else "")

    def __getitem__(self, name: str) -> Value:
        return next(value for value in self.values if value.name == name)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "samples": self.samples,
            **self.details,
            "sha256": self.sha256,
            **{value.name: value.to_dict() for value in self.values},
        }


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One measure of the dense and of the compressed model; `before` is None where the dense model is what is compared with.

    `armor eval` knows the measure's `keys` with their defaults, too, and with a preset the hash of the dense weights as `origin`.
    """

    name: str
    before: Measured | None
    after: Measured
    keys: Mapping[str, Any] = field(default_factory=dict)
    origin: str | None = None

    @property
    def differences(self) -> tuple[Value, ...]:
        """What differs from before, with intervals of paired samples, which are narrower than the two figures' own."""
        return () if self.before is None else self.after.against(self.before)


@dataclass(frozen=True, slots=True)
class Reading:
    """What data are read with.

    Attributes:
        tokenizer: the model's, where it has one.
        model: what the model can be called with.
        inputs: chooses the samples that a section with the keys of `calibration` describes.
        labels: the numbers of its classes by their names.
        processor: gives the model's processor of images, with text (True) or without; None where there is none.

    """

    tokenizer: PreTrainedTokenizerBase | None
    model: ModelInputs
    inputs: Callable[[InputsSpec], InputSet]
    labels: Mapping[str, int] = field(default_factory=dict)
    processor: Callable[[bool], Any] | None = None


@dataclass(frozen=True, slots=True)
class Room:
    """A folder for what a measure keeps of the dense model until the compressed one is measured, and whom it tells of progress."""

    folder: Path
    on_progress: OnProgress | None = None


class Measure(ABC, Generic[SpecT]):
    """One thing that is measured of a model: a file of this folder, a line in `MEASURES`, and a key of `evaluation`.

    `name` is that key, and `spec_type` what it may say. A measure that `keeps` something of the dense model gets a folder for it.
    `together` says that it shares its samples out among the processes of a run (`in_order`); else one of them takes it.
    """

    name: ClassVar[str]
    spec_type: ClassVar[type[Strict]]
    keeps: ClassVar[bool] = False
    together: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def check(cls, model: nn.Module) -> None:
        """Raise PlanError where it cannot be measured of such a model, which may be on the meta device."""

    @classmethod
    @abstractmethod
    def read(cls, spec: SpecT, reading: Reading) -> Self:
        """The measure with its data. Raises InputError."""

    @property
    @abstractmethod
    def sha256(self) -> str:
        """The hash of what it is measured on, in hex."""

    def dense_bytes(self, model: nn.Module) -> int:
        """What it will keep of the dense model, as far as shapes tell; the model may be on the meta device."""
        del model  # nothing is kept of any
        return 0

    @property
    def tokens(self) -> int:
        """Tokens of one round, for the estimate of time; 0 where they are few or none."""
        return 0

    def before(self, model: nn.Module, room: Room) -> Measured | None:
        """Measure the dense model, or keep of it what `after` compares with. Raises InputError and NumericalError."""
        return self.after(model, room)

    @abstractmethod
    def after(self, model: nn.Module, room: Room) -> Measured:
        """Measure the compressed model. Raises InputError and NumericalError."""
