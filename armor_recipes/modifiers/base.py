"""The contract of a modifier: what all kinds are told and asked. What each kind adds is in `modifiers/kinds`, a file each.

The engine (session) knows no modifier by name and no kind: it asks a modifier what it `needs`, and its `kind` for the rows of
its plan and for the steps of a run.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Generic, Literal, Protocol, Self, TypeVar, runtime_checkable

import torch
from pydantic import AfterValidator, Field
from torch import Tensor

from armor_recipes.calibration.state import StatisticState
from armor_recipes.recipe.schema import ModifierConfig
from armor_recipes.solver.patterns import parse_pattern

if TYPE_CHECKING:
    from armor_recipes.modifiers.kinds.contract import Kind

#: Called during a solve with (iterations done, at most, best relative loss).
SolveProgress = Callable[[int, int, float], None]
Propagate = Literal["compressed", "dense"]
StoredAs = Literal["packed", "dense", "quantized"]
#: Why a method that computes new weights cannot follow one of category `quantize`.
UNROUNDED = "it would put unrounded numbers in the place of quantised ones"
CoreType = Literal["float", "int8", "int4", "fp8"]


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
class Served:
    """What a server asks of a module's blocks: all modules of one `layer`, by its full name, have one size, and its sides divide
    `rows` and `columns`, so that no process has half a block.
    """

    layer: str
    rows: int
    columns: int


@dataclass(frozen=True, slots=True)
class ModuleShape:
    """A linear module as the plan knows it: full name, weight `(d_out, d_in)`, and bytes of one stored weight value.

    `parts` are the rows of each where modules that read the same input are solved stacked; no block may straddle two.
    `block_size` is the planned (b_o, b_i) where there is a plan and it has one. `served` is there where a recipe's block sizes are
    chosen among many, and has a `serve`.
    """

    name: str
    d_out: int
    d_in: int
    itemsize: int
    parts: tuple[int, ...] = ()
    block_size: tuple[int, int] | None = None
    served: Served | None = None

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weight as stored."""
        return self.d_out * self.d_in * self.itemsize


@dataclass(frozen=True, slots=True)
class Tap:
    """A place beside a linear module's input that a statistic is fed from: what a module puts out, or the keys or values that an
    attention module hands to its cache. `width` is the last dimension of what comes; 0 where shapes do not tell it.
    """

    module: str
    side: Literal["output", "keys", "values"]
    width: int = 0

    @property
    def name(self) -> str:
        """Of its statistic, among those of modules."""
        return f"{self.module}:{self.side}"


def join_shapes(shapes: Sequence[ModuleShape]) -> ModuleShape:
    """The shape of modules that read the same input, stacked along their outputs; of one module, its own."""
    first = shapes[0]
    name = " + ".join(shape.name for shape in shapes)
    if len(shapes) == 1:
        return first
    rows = tuple(shape.d_out for shape in shapes)
    return ModuleShape(name, sum(rows), first.d_in, first.itemsize, rows, first.block_size)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A modifier's answer at plan time for one module.

    Attributes:
        stored_bytes: bytes of the module's weight in the checkpoint.
        factor_bytes: the share of `stored_bytes` that A and B take; 0 without factors.
        block_size: (b_o, b_i), or None without factors.
        flops: floating-point operations of the solve, for the estimate of time.
        peak_bytes: working memory of the solve.
        stored_as: `packed` (a 2:4 core and its factors), `quantized` (a plain weight in a format of compressed-tensors) or
            `dense` (one plain weight, whatever made it).
        core: what a packed core's kept values are: `float`, `int8`, `int4` or `fp8`.
        group_size: kept values that have one scale; None for a whole row, and where the core is float.
        activations: what Bx is rounded to as the layer runs: `int8`, `fp8`, or None for nothing.
        parts: how many pieces of the work a CPU may compute side by side, of which each takes `part_bytes` besides `peak_bytes`.
    """

    stored_bytes: int
    flops: float
    peak_bytes: int
    factor_bytes: int = 0
    block_size: tuple[int, int] | None = None
    stored_as: StoredAs = "dense"
    core: CoreType = "float"
    group_size: int | None = None
    activations: str | None = None
    parts: int = 0
    part_bytes: int = 0


class Statistic(Protocol):
    """Accumulates what a modifier needs of a module's inputs. Those of `armor_recipes.calibration` will do for most."""

    @property
    def name(self) -> str:
        """The module that is observed, the first of those that read the same input."""

    @property
    def tokens(self) -> int:
        """Input rows seen so far."""

    def update(self, x: Tensor) -> None:
        """Take inputs `(..., I)`; with `propagate: matched` a second tensor, what the dense module reads on the same tokens."""

    def merge(self, other: Self) -> None:
        """Take all that another one has seen of the same module, after all that this one has; equal pieces in equal order give
        equal bits. Raises ValueError where the other one is of another kind, module or width.
        """

    def state(self) -> StatisticState:
        """All that was seen, bit for bit."""

    def load_state(self, state: StatisticState) -> None:
        """Go on from what `state` gave, before the first `update`. Raises ValueError where it is of another statistic."""


@runtime_checkable
class KnowsOrigins(Protocol):
    """A statistic that tells windows apart by the dataset that they come from."""

    def expect(self, origins: Sequence[int], first: int = 0) -> None:
        """Before the first `update`: the number of its dataset for each window of the calibration, in order, and the number of the
        first window to come.
        """


@runtime_checkable
class KnowsItsSize(Protocol):
    """A statistic that says what it takes, for the plan's estimate and for experts that few tokens reach."""

    @property
    def full_bytes(self) -> int:
        """Memory of its sums once it has seen enough of each kind."""

    @property
    def enough_tokens(self) -> int:
        """From how many tokens on an expert's own is better than that of all experts of its layer."""


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

    def merge(self, other: WithGradients) -> None:
        """Merge the input statistics. Raises ValueError where the gradients differ, which are of the whole calibration."""
        self._check_gradients(other.gradients)
        self.inputs.merge(other.inputs)

    def state(self) -> StatisticState:
        """That of the input statistic, with the gradients beside it."""
        found: StatisticState = self.inputs.state()
        return replace(found, tensors={**found.tensors, "gradients": self.gradients})

    def load_state(self, state: StatisticState) -> None:
        """Load the input statistic. Raises ValueError where the gradients differ."""
        self._check_gradients(state.tensors.get("gradients"))
        self.inputs.load_state(state)

    def _check_gradients(self, other: Tensor | None) -> None:
        if other is None or not torch.equal(self.gradients, other.to(self.gradients.device)):
            raise ValueError(
                f"the gradients at the outputs of {self.name} differ: they are of other tokens or another model"
            )

    def split(self, rows: Sequence[int]) -> list[WithGradients]:
        """The statistics of modules that were solved stacked, by their numbers of rows."""
        return [replace(self, gradients=part) for part in self.gradients.split(list(rows))]


#: A model that calibration windows run through: as `compressed` so far, or the `dense` one.
StreamKind = Literal["compressed", "dense"]


@dataclass(frozen=True, slots=True)
class Needs:
    """What a modifier asks of the engine.

    Attributes:
        streams: the models whose activations it reads.
        feeds: the one of them on which the engine feeds its `statistic` of each module's inputs; None where it has none, or
            feeds it itself.
        when: `before` anything else in a block is observed or changed; `in turn`, in the recipe's order; `after` the last
            block of the stage.
        joint: whether nothing lies in the order of modifiers like this that stand side by side and change other modules.
        gradients: whether it reads the loss's gradients at its modules' outputs: a pass of the windows back through the model.
        factors: whether it reads the factors that modifiers before it made.
        dense: what of the original it compares with: a copy of the `block` with its inputs, the block's `outputs`, or the
            parameters of the whole `model`; empty for nothing.
        ahead: whether its plan looks at what entries behind it will do: it is made after theirs.
        because: what of the recipe asks for the original, for messages.
    """

    streams: tuple[StreamKind, ...] = ()
    feeds: StreamKind | None = None
    when: Literal["before", "in turn", "after"] = "in turn"
    joint: bool = False
    gradients: bool = False
    factors: bool = False
    dense: Literal["", "block", "outputs", "model"] = ""
    ahead: bool = False
    because: str = "it"

    def streams_for(self, rows: Iterable[Any]) -> tuple[StreamKind, ...]:
        """The streams that these rows of a plan take: none where what the engine feeds is all, and they look at nothing."""
        idle = self.feeds is not None and self.when == "in turn" and not any(row.observed or row.taps for row in rows)
        return () if idle else self.streams


def fed_with_inputs(config: ModifierConfig, **others: Any) -> Needs:
    """The needs of a modifier whose statistic is fed with its modules' inputs, from where the config's `propagate` says."""
    if config.calibration is None:
        return Needs(**others)
    source: Any = getattr(config, "propagate", "compressed")
    return Needs(streams=(source,), feeds=source, because=f"propagate: {source}", **others)


@dataclass(frozen=True, slots=True)
class Unsettled:
    """The `key` of a modifier's config whose value rests on a measurement of the model.

    `windows` of the calibration are measured on, `gradients` says whether the statistics of `trial` come in a `WithGradients`, and
    `settings` are the values of the config that the measurement depends on: where they are equal it need not be taken again.
    `share` is what a trial takes of a solve, for the estimate of time.
    """

    key: str
    windows: int
    gradients: bool = False
    share: float = 0.0
    settings: Mapping[str, str | int | float | bool] = field(default_factory=dict)


@runtime_checkable
class Settles(Protocol):
    """A modifier that may have a field that is settled by measuring the model, once it is loaded and before anything is changed.

    The engine measures what a change of each module's weight would cost the model. Until then the modifier plans provisionally.
    """

    @property
    def unsettled(self) -> Unsettled | None:
        """What is not known yet; None where all is."""

    def trial(self, module: ModuleShape, weight: Tensor, statistic: Any) -> Tensor:
        """The change `(O, I)` of the weight whose cost is measured, given an `InputSecondMoment` of the module's inputs."""

    def settle(self, modules: Sequence[ModuleShape], costs: Mapping[str, float]) -> Any:
        """The config with the field settled; `costs` are in nats a token, by module. Raises PlanError."""


C = TypeVar("C", bound=ModifierConfig)


class AnyModifier(ABC, Generic[C]):
    """What all kinds have. Subclasses are registered with `@register` and hold no mutable state.

    Class attributes:
        kind: how its plan is made and its steps are run; set by the class of each kind.
        config_type: the pydantic class of the fields a recipe may give.
        category: what it does to a weight; two modifiers of one category never share a module, but a quantiser of plain weights
            takes the place of one before it.
        traits: words beside the category by which the rules of others know it, such as `factors` for what makes some.
        cannot_follow: categories and traits after which it cannot run on the same module, with the reason for each.
        needs_before: categories and traits of which one must have run on a module of its own, with the reason for each.
        needs_after: categories and traits of which one must run on a module of its own later, with the reason for each.
    """

    kind: ClassVar[Kind]
    config_type: ClassVar[type[ModifierConfig]]
    category: ClassVar[str]
    traits: ClassVar[tuple[str, ...]] = ()
    cannot_follow: ClassVar[Mapping[str, str]] = {}
    needs_before: ClassVar[Mapping[str, str]] = {}
    needs_after: ClassVar[Mapping[str, str]] = {}

    def __init__(self, config: C) -> None:
        self.config = config

    @classmethod
    def lack(cls) -> str:
        """What a class of this kind lacks to be registered, as the end of a sentence; empty for nothing."""
        return ""

    def check_windows(self, origins: Sequence[int]) -> None:
        """Raise PlanError where calibration windows are too few; `origins` has the number of its dataset for each of them.

        Asked before any weight is read, with the windows that came: with `samples: {at_most: N}` the plan does not know them.
        """

    def alike(self, module: ModuleShape) -> Hashable:  # noqa: ARG002 - for those whose statistics differ
        """What the statistics of modules that read the same tensor must have in common to be one."""
        return None

    def listen(self, tap: Tap) -> Statistic:
        """A new accumulator for a place that a row of it taps."""
        raise NotImplementedError(f"{type(self).__name__} taps {tap.name} without a statistic for it")

    @property
    def unties(self) -> bool:
        """Whether an output layer that it takes gets a weight of its own, where it has that of the embeddings."""
        return False

    @property
    def takes_modules(self) -> bool:
        """Whether it does anything to the linear modules that `targets` match."""
        return True

    @property
    def words(self) -> tuple[str, ...]:
        """What rules about order may call it: its category and its traits."""
        return (self.category, *self.traits)

    def poor_after(self, earlier: AnyModifier[Any], rows: Sequence[Any]) -> str:  # noqa: ARG002 - for those that have a figure
        """What was measured of it where it follows another one on modules and that is legal, but poor: the figure, and what is
        better, as a sentence; empty where nothing was. The plan warns of it. `rows` are its own on the modules that both take.
        """
        return ""

    def poor_on(self, datasets: int) -> str:  # noqa: ARG002 - for those that have a figure
        """As `poor_after`, where its calibration is of so many datasets."""
        return ""

    @property
    def needs(self) -> Needs:
        """What it asks of the engine."""
        return Needs()

    @property
    def steps(self) -> int:
        """Steps of a solve at most, each over the whole weight, for the estimate of time."""
        return 0

    @property
    def sparsity(self) -> str | None:
        """The pattern `N:M` that it brings its modules to; None where it brings them to none."""
        return None
