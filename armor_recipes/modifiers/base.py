"""The contract of a modifier: what it is told, what it answers, and the few rules that the engine checks for it.

The engine (session) knows no modifier by name. It asks each one, module by module: `plan` (on shapes alone, before any
weight is read), `statistic` (an accumulator for the module's inputs), then `solve`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Generic, Literal, Protocol, TypeVar

from pydantic import AfterValidator, Field
from torch import Tensor

from armor_recipes.recipe.schema import ModifierConfig
from armor_recipes.solver import Factorization
from armor_recipes.solver.patterns import parse_pattern

#: Called during a solve with (iterations done, at most, best relative loss).
SolveProgress = Callable[[int, int, float], None]
Propagate = Literal["compressed", "dense"]
StoredAs = Literal["packed", "dense"]


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
    """A linear module as the plan knows it: full name, weight `(d_out, d_in)`, and bytes of one stored weight value."""

    name: str
    d_out: int
    d_in: int
    itemsize: int

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight as stored."""
        return self.d_out * self.d_in * self.itemsize


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
    """

    stored_bytes: int
    flops: float
    peak_bytes: int
    factor_bytes: int = 0
    block_size: tuple[int, int] | None = None
    stored_as: StoredAs = "dense"


@dataclass(frozen=True, slots=True)
class Outcome:
    """A solved module: the approximated weight Ŵ `(O, I)` float32, its factors if they are to be stored, and what was measured.

    `losses` are relative to Ŵ = 0, first entry the start of the method. `counts` names everything out of the ordinary.
    """

    weight: Tensor
    losses: tuple[float, ...]
    factorization: Factorization | None = None
    stop_reason: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)


class Statistic(Protocol):
    """Accumulates what a modifier needs of a module's inputs."""

    @property
    def tokens(self) -> int:
        """Input rows seen so far."""

    def update(self, x: Tensor) -> None:
        """Take inputs `(..., I)`."""


C = TypeVar("C", bound=ModifierConfig)


class Modifier(ABC, Generic[C]):
    """One method of changing linear modules. Subclasses are registered with `@register` and hold no mutable state.

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
