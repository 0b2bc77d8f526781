"""The contract of a modifier: what it is told, what it answers, and the few rules that the engine checks for it.

The engine (session) knows no modifier by name. There are four kinds. A `Modifier` changes linear modules one by one: it is
asked for `plan` (on shapes alone, before any weight is read), `statistic` (an accumulator for the module's inputs), then
`solve`. A `Refiner` trains the factors that an earlier modifier made, of a decoder layer or of the whole model, against
what the dense layer or model gives on the same tokens. A `FactorModifier` gives the factors of one module another form,
around the product that they make. A `Rearranger` reorders channels inside a layer, before anything else in it, and leaves
its function as it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Generic, Literal, Protocol, TypeVar, runtime_checkable

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from armor_recipes.recipe.schema import ModifierConfig
from armor_recipes.solver import Factorization
from armor_recipes.solver.patterns import parse_pattern
from armor_recipes.solver.result import SparseFactors
from armor_recipes.solver.trainable import TrainableFactors

#: Called during a solve with (iterations done, at most, best relative loss).
SolveProgress = Callable[[int, int, float], None]
Propagate = Literal["compressed", "dense"]
StoredAs = Literal["packed", "dense"]
CoreType = Literal["float", "int8", "int4"]


def _checked_pattern(text: str) -> str:
    """The pattern in its plain form. Raises ValueError where it is none."""
    return str(parse_pattern(text))


SparsityPattern = Annotated[
    str, AfterValidator(_checked_pattern), Field(json_schema_extra={"pattern": "^[0-9]{1,2}:[0-9]{1,2}$"})
]


class CalibratedConfig(ModifierConfig):
    """Fields of every modifier that learns from calibration inputs."""

    needs_calibration: ClassVar[bool] = True

    propagate: Propagate = Field(
        default="compressed",
        title="Error propagation",
        description="Where calibration inputs come from: `compressed`, the model as compressed so far; `dense`, the original "
        "model.",
    )
    pattern: SparsityPattern = Field(
        default="2:4",
        title="Sparsity pattern",
        description="`N:M`: N kept values in every M consecutive entries of a row, M at most 32 and a divisor of the row's "
        "length. Only 2:4 is packed; other patterns are stored dense, which the plan shows.",
    )


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A linear module as the plan knows it: full name, weight `(d_out, d_in)`, and bytes of one stored weight value.

    `parts` are the rows of each where modules that read the same input are solved stacked; no block may straddle two.
    """

    name: str
    d_out: int
    d_in: int
    itemsize: int
    parts: tuple[int, ...] = ()

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight as stored."""
        return self.d_out * self.d_in * self.itemsize


def join_shapes(shapes: Sequence[ModuleShape]) -> ModuleShape:
    """The shape of modules that read the same input, stacked along their outputs; of one module, its own."""
    first = shapes[0]
    name = " + ".join(shape.name for shape in shapes)
    if len(shapes) == 1:
        return first
    rows = tuple(shape.d_out for shape in shapes)
    return ModuleShape(name, sum(rows), first.d_in, first.itemsize, rows)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A modifier's answer at plan time for one module.

    Attributes:
        stored_bytes: bytes of the module's weight in the checkpoint.
        factor_bytes: the share of `stored_bytes` that A and B take; 0 without factors.
        block_size: (b_o, b_i), or None without factors.
        flops: floating-point operations of the solve, for the estimate of time.
        peak_bytes: working memory of the solve.
        stored_as: `packed` (a 2:4 core and its factors) or `dense` (one plain weight, whatever made it).
        core: what a packed core's kept values are: `float`, `int8` or `int4`.
    """

    stored_bytes: int
    flops: float
    peak_bytes: int
    factor_bytes: int = 0
    block_size: tuple[int, int] | None = None
    stored_as: StoredAs = "dense"
    core: CoreType = "float"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A solved module: the approximated weight Ŵ `(O, I)` float32, its factors if they are to be stored, and what was measured.

    `losses` are relative to Ŵ = 0, first entry the start of the method; `iterations` is how many steps it took.
    `counts` names everything out of the ordinary, `measures` numbers that the method chose.
    """

    weight: Tensor
    losses: tuple[float, ...]
    factorization: Factorization | None = None
    iterations: int = 0
    stop_reason: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    measures: Mapping[str, float] = field(default_factory=dict)

    def split(self, rows: Sequence[int]) -> list[Outcome]:
        """The outcomes of modules that were solved stacked, by their numbers of rows; losses and counts are those of all."""
        if len(rows) == 1:
            return [self]
        parts = [None] * len(rows) if self.factorization is None else self.factorization.split(rows)
        weights = self.weight.split(list(rows))
        return [replace(self, weight=w, factorization=f) for w, f in zip(weights, parts, strict=True)]


class Statistic(Protocol):
    """Accumulates what a modifier needs of a module's inputs."""

    @property
    def name(self) -> str:
        """The module that is observed, the first of those that read the same input."""

    @property
    def tokens(self) -> int:
        """Input rows seen so far."""

    def update(self, x: Tensor) -> None:
        """Take inputs `(..., I)`; with `propagate: matched` a second tensor, what the dense module reads on the same tokens."""


@runtime_checkable
class KnowsOrigins(Protocol):
    """A statistic that tells windows apart by the dataset that they come from."""

    def expect(self, origins: Sequence[int]) -> None:
        """Before the first `update`: the number of its dataset for each window to come, in order."""


@dataclass(frozen=True, slots=True)
class WithGradients:
    """A module's input statistic, and g `(O,)`: the mean square of the gradient of the model's loss at each output, float32.

    The loss is the cross-entropy, summed over a window's tokens, of labels drawn from the model's own probabilities at the start
    of the stage; the mean is over the tokens that the module sees. For modules solved stacked g is theirs one after the other.
    """

    inputs: Any
    gradients: Tensor

    @property
    def name(self) -> str:
        """That of the input statistic."""
        return str(self.inputs.name)

    @property
    def tokens(self) -> int:
        """Those of the input statistic."""
        return int(self.inputs.tokens)

    def update(self, x: Tensor) -> None:
        """Take inputs."""
        self.inputs.update(x)

    def split(self, rows: Sequence[int]) -> list[WithGradients]:
        """The statistics of modules that were solved stacked, by their numbers of rows."""
        return [replace(self, gradients=part) for part in self.gradients.split(list(rows))]


C = TypeVar("C", bound=ModifierConfig)


class AnyModifier(ABC, Generic[C]):
    """What all kinds have. Subclasses are registered with `@register` and hold no mutable state.

    Class attributes:
        config_type: the pydantic class of the fields a recipe may give.
        category: what it does to a weight; two modifiers of one category never share a module.
        cannot_follow: categories after which it cannot run on the same module, with the reason for each.
    """

    config_type: ClassVar[type[ModifierConfig]]
    category: ClassVar[str]
    cannot_follow: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: C) -> None:
        self.config = config


class Modifier(AnyModifier[C]):
    """One method of changing linear modules, each by itself."""

    @property
    def needs_gradients(self) -> bool:
        """Whether `solve` and `loss` get their statistic in a `WithGradients`; costs a backward pass through the model."""
        return False

    @abstractmethod
    def plan(self, module: ModuleShape) -> Estimate:
        """Check that the module can be taken and estimate the cost. Raises PlanError with the sizes that would fit."""

    @abstractmethod
    def statistic(self, module: ModuleShape) -> Statistic:
        """A new accumulator for the module's calibration inputs."""

    @abstractmethod
    def solve(self, module: ModuleShape, weight: Tensor, statistic: Any, on_progress: SolveProgress | None) -> Outcome:
        """Change one weight `(O, I)`, given the statistic that `statistic` made. Raises NumericalError."""

    @abstractmethod
    def loss(self, weight: Tensor, statistic: Any, approximation: Tensor) -> float:
        """The relative loss of an approximation `(O, I)`: recomputed after rounding to the stored dtype."""


@dataclass(frozen=True, slots=True)
class RefineUnit:
    """What a refiner trains at once, as the plan knows it: the modules, the parameters around them, and the tokens it sees.

    Attributes:
        modules: the factorised modules.
        factor_values: numbers that are trained: A, the kept values of S, and B of all of them.
        parameters: numbers of the layer or model that a forward pass reads.
        tokens: calibration tokens.
        batch_tokens: tokens of one batch.
    """

    modules: tuple[ModuleShape, ...]
    factor_values: int
    parameters: int
    tokens: int
    batch_tokens: int


@dataclass(frozen=True, slots=True)
class UnitOutput:
    """What a unit makes of one batch: the layer's hidden states `(B, L, H)` or the model's logits `(B, L, V)`; and for a model
    the outputs `(B, L, H)` of the layers that its refiner asked for.
    """

    output: Tensor
    hidden: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class RefineTask:
    """One unit to train. Everything is in memory already, on the model's device.

    Attributes:
        factors: what is trained, by the module's full name; modules that share a B hold the very same parameter.
        vectors: weights of norms of the unit by full name, trained on request.
        batches: how many calibration batches there are.
        forward: the unit's output for batch i with the present factors and vectors, differentiable. Threads may call it at once.
        target: the dense unit's output for batch i.
    """

    factors: Mapping[str, TrainableFactors]
    vectors: Mapping[str, nn.Parameter]
    batches: int
    forward: Callable[[int], UnitOutput]
    target: Callable[[int], UnitOutput]


@dataclass(frozen=True, slots=True)
class RefineOutcome:
    """Held-out losses, the first before training; the factors and vectors are left at the best of them.

    `clipped` counts gradients of batches that were shortened.
    """

    losses: tuple[float, ...]
    steps: int
    stop_reason: str
    clipped: int = 0


class Refiner(AnyModifier[C]):
    """Trains factors that an earlier modifier of the same stage made.

    Class attribute `scope`: `layer` runs after the layer's other modifiers, on the outputs of the layer; `model` runs at the
    end of the stage, on logits.
    """

    scope: ClassVar[Literal["layer", "model"]]
    category: ClassVar[str] = "refine"

    def hidden_layers(self, total: int) -> tuple[int, ...]:  # noqa: ARG002 - for those that override it
        """Of a model with so many decoder layers, those whose hidden states the loss compares (scope `model`)."""
        return ()

    def compute_dtype(self, parameter: Tensor) -> torch.dtype:
        """Of the passes (scope `model`), given a parameter of the model."""
        return parameter.dtype

    @abstractmethod
    def plan(self, unit: RefineUnit) -> Estimate:
        """Estimate the cost of one unit; bytes stay what they were. Raises PlanError."""

    @abstractmethod
    def refine(self, task: RefineTask, on_progress: SolveProgress | None) -> RefineOutcome:
        """Train the task's factors in place. Raises NumericalError."""


@dataclass(frozen=True, slots=True)
class FactorOutcome:
    """A module's factors in another form, and what was measured.

    `losses` are against the product A · S · B before, relative to 0 in its place: first that of the method's start. `counts`
    names everything out of the ordinary.
    """

    factors: SparseFactors
    losses: tuple[float, ...]
    iterations: int = 0
    stop_reason: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)


class FactorModifier(AnyModifier[C]):
    """Changes the factors that an earlier modifier of this stage or another made, of one module at a time.

    It needs no dense model: the product that the factors give before is what it keeps to. Modules that share their B are
    given to it as one, stacked along their rows, and share what it makes of their B.
    """

    @abstractmethod
    def plan(self, module: ModuleShape, block_size: tuple[int, int]) -> Estimate:
        """Check that the module can be taken, and estimate the cost; bytes are exact. Raises PlanError."""

    @abstractmethod
    def statistic(self, module: ModuleShape) -> Statistic:
        """A new accumulator for the module's calibration inputs."""

    @abstractmethod
    def change(
        self, module: ModuleShape, factors: SparseFactors, statistic: Any, on_progress: SolveProgress | None
    ) -> FactorOutcome:
        """New factors, in the dtype of those given, which is that of the checkpoint. Raises NumericalError."""

    @abstractmethod
    def loss(self, target: Tensor, statistic: Any, approximation: Tensor) -> float:
        """The relative loss of an approximation `(O, I)` of the product before: recomputed on what is stored."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A linear module, the consumer, and the modules of its layer whose output channels are its input channels.

    `head_dim` is the size of the model's attention heads, None where its configuration does not tell.
    """

    consumer: ModuleShape
    producers: tuple[ModuleShape, ...]
    head_dim: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """All modules, the consumer first."""
        return (self.consumer.name, *(producer.name for producer in self.producers))


@dataclass(frozen=True, slots=True)
class Rearrangement:
    """New orders: the consumer's column i is its old `columns[i]` `(d_in,)`, a producer's row i its old `rows[i]` `(d_out,)`.

    `kept` are the shares of the score that the best masks keep, in the old order and in the new one.
    """

    columns: Tensor
    rows: Tensor
    kept: tuple[float, float]


class Rearranger(AnyModifier[C]):
    """Reorders channels between modules of a layer, whose function stays: the engine checks that on a calibration batch.

    Its targets are the consumers. It runs in a layer before all modifiers that change the layer.
    """

    category: ClassVar[str] = "rearrange"

    @abstractmethod
    def producers(self, consumer: str) -> tuple[str, ...]:
        """Full names of the modules that make the consumer's inputs. Raises PlanError where it knows none."""

    @abstractmethod
    def plan(self, chain: Chain) -> Estimate:
        """Check the shapes and estimate the cost; bytes stay what they were. Raises PlanError."""

    @abstractmethod
    def statistic(self, module: ModuleShape) -> Statistic:
        """A new accumulator for the consumer's calibration inputs."""

    @abstractmethod
    def rearrange(self, chain: Chain, weight: Tensor, statistic: Any) -> Rearrangement:
        """New orders for the consumer's weight `(O, I)`, given the statistic that `statistic` made. Raises NumericalError."""
