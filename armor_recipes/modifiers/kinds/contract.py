"""What every kind gives the engine: rows of a plan, and steps that look at a block and return changes."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from math import prod
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from armor_recipes.calibration.inputs import Batch, InputSet
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.quantized import QuantizedCache
from armor_recipes.errors import ArmorError, PlanError, UnfitError
from armor_recipes.events import Observer, SolveProgressed
from armor_recipes.model.blocks import Stack, Stacks
from armor_recipes.model.calls import LayerCall
from armor_recipes.model.facts import ModelFacts
from armor_recipes.model.hooks import Hooks
from armor_recipes.model.linears import Linears
from armor_recipes.model.replay import Activations, on_device
from armor_recipes.model.store import WeightStore
from armor_recipes.modifiers.base import (
    AnyModifier,
    KnowsOrigins,
    ModuleShape,
    SolveProgress,
    Statistic,
    StreamKind,
    Tap,
)
from armor_recipes.modifiers.kinds.changes import Changes, ModuleResult
from armor_recipes.recipe import ModifierEntry, Recipe
from armor_recipes.recipe.schema import AtMost, CalibrationSpec, MoeSpec

#: One stream of activations for each distinct calibration set and model that it runs through.
StreamKey = tuple[CalibrationSpec, StreamKind]
#: Statistics by module.
Statistics = Mapping[str, Statistic]


class Row:
    """One piece of planned work: a frozen dataclass of plain, hashable data for each kind.

    Attributes:
        section: the list of the plan that it stands in.
        modifier: the entry's key.
        stage: the stage's name.
        layer: number of the block, from 0; None for what is done to the whole model.
        flops: floating-point operations, for the estimate of time.
        peak_bytes: working memory.
    """

    __slots__ = ()
    section: ClassVar[str]
    modifier: str
    stage: str
    layer: int | None
    flops: float
    peak_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for `--plan --json`."""
        return asdict(self)  # type: ignore[call-overload, no-any-return]  # subclasses are dataclasses

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Weights `(d_out, d_in)` that are replaced, by module; nothing where the rows of others name them."""
        return {}

    @property
    def takes(self) -> tuple[str, ...]:
        """Modules that no other modifier of the category may take."""
        return ()

    @property
    def touches(self) -> tuple[str, ...]:
        """Modules whose weights it changes in any way, which rules about order are about."""
        return tuple(dict.fromkeys((*self.takes, *self.shapes)))

    @property
    def schemes(self) -> Mapping[str, str]:
        """What whole weights are quantised to, by module: compressed-tensors' config group as JSON."""
        return {}

    @property
    def observed(self) -> tuple[ModuleShape, ...]:
        """Modules whose inputs feed a statistic."""
        return ()

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Other places that feed a statistic, by `listen` of the modifier."""
        return ()

    @property
    def side_by_side(self) -> tuple[int, int]:
        """How many pieces of it a CPU may compute at once, and what each takes besides `peak_bytes`."""
        return 0, 0


@dataclass(frozen=True, slots=True)
class Planning:
    """What a kind makes an entry's rows of: shapes and what was planned before, no weights.

    Attributes:
        model: the model on the meta device.
        linears: its linear modules, and what shares their weights.
        names: the targeted linear modules, in the model's order; of modules that share a weight the first.
        uses: for each of them whose weight stands elsewhere, too, the names of the modules there.
        rows: of the entries before.
        before: the entries before, with their modifiers.
        itemsize: bytes of one stored weight value.
        after: rows of the entries behind, for modifiers whose `needs.ahead` says so.
    """

    recipe: Recipe
    entry: ModifierEntry
    model: nn.Module
    stacks: Stacks
    facts: ModelFacts
    linears: Linears
    names: tuple[str, ...]
    uses: Mapping[str, tuple[str, ...]]
    rows: tuple[Row, ...]
    before: tuple[tuple[ModifierEntry, AnyModifier[Any]], ...]
    itemsize: int
    after: tuple[Row, ...] = ()

    def made(self, section: str) -> list[Any]:
        """The rows of one section among those of the entries before."""
        return [row for row in self.rows if row.section == section]

    def each(self, names: Sequence[str], make: Callable[[str], Row]) -> Planned:
        """What `make` plans for each module. What it refuses is a problem, one for those that are refused for the same reason; with
        `unfit: skip` it is left as it is.
        """
        rows: list[Row] = []
        refused: dict[str, PlanError] = {}
        for name in names:
            try:
                rows.append(make(name))
            except PlanError as error:
                refused[name] = error
        problems, skipped = self.unfit(refused)
        return Planned(tuple(rows), problems, skipped)

    def unfit(self, refused: Mapping[str, PlanError]) -> tuple[tuple[str, ...], tuple[Skipped, ...]]:
        """Problems, or with `unfit: skip` what is left as it is, of modules that the entry cannot take."""
        if self.entry.config.unfit == "skip":
            return (), tuple(self._skipped(name, error) for name, error in refused.items())
        alike: dict[str, list[str]] = {}
        for name, error in refused.items():
            alike.setdefault(str(error).replace(name, "{}"), []).append(name)
        return tuple(
            f"{once(text, found)}; `unfit: skip` leaves such modules as they are" for text, found in alike.items()
        ), ()

    def _skipped(self, name: str, error: PlanError) -> Skipped:
        module = self.model.get_submodule(name)
        shapes = [tuple(value.shape) for value in module.parameters(recurse=False)]
        reason = error.reason if isinstance(error, UnfitError) else str(error)
        largest = max(shapes, key=prod, default=())
        return Skipped(name, type(module).__name__, largest, reason, self.entry.key, self.entry.stage)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A targeted module that an entry with `unfit: skip` cannot change and leaves as it is.

    `kind` is the module's class, `shape` that of its weight (of its largest one where it has several), `modifier` the entry's key.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    reason: str
    modifier: str
    stage: str


@dataclass(frozen=True, slots=True)
class Overridden:
    """What was asked for a module in one place and is not done, because another place counts.

    `what` is what was asked for, in words; `modifier` the key of the entry that asked, and `by` that of the one that counts: the
    same, where two groups of one entry match the module.
    """

    name: str
    what: str
    modifier: str
    by: str


@dataclass(frozen=True, slots=True)
class Planned:
    """Rows of one entry, what is wrong with it, and what it leaves as it is.

    `replaced` are rows of entries before which count no longer, and `overridden` tells of them, one for each module.
    """

    rows: tuple[Row, ...]
    problems: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    replaced: tuple[Row, ...] = ()
    overridden: tuple[Overridden, ...] = ()


@dataclass(frozen=True, slots=True)
class Share:
    """What one entry has to do in a block, or at the end of a stage."""

    entry: ModifierEntry
    modifier: AnyModifier[Any]
    rows: tuple[Any, ...]

    @property
    def takes(self) -> set[str]:
        """Modules that are taken."""
        return {name for row in self.rows for name in row.takes}

    @property
    def streams(self) -> tuple[StreamKind, ...]:
        """The models whose activations its rows take."""
        return self.modifier.needs.streams_for(self.rows)

    @property
    def every_expert(self) -> bool:
        """Whether every expert is calibrated on all tokens."""
        spec = self.entry.config.calibration
        return spec is not None and spec.experts == "all"

    def stream_key(self, kind: StreamKind) -> StreamKey:
        """Of its calibration set on that model."""
        spec = self.entry.config.calibration
        assert spec is not None
        return spec, kind


@dataclass(frozen=True, slots=True)
class Unit:
    """One step: what is computed before anything of it is written. `key` names it within a run."""

    key: str
    shares: tuple[Share, ...]


@dataclass(frozen=True, slots=True)
class Storage:
    """How weights will lie in the checkpoint: `dtype`, and whether `packed` factors or what they fold into."""

    dtype: torch.dtype
    packed: bool

    @property
    def factor_dtype(self) -> torch.dtype:
        """Of factors: those to be folded into dense weights are rounded once, as products, and not before."""
        return self.dtype if self.packed else torch.float32


@dataclass(slots=True)
class State:
    """What a run has come to besides the weights; written by the commit alone.

    Attributes:
        modules: results by module, in the order of the first; the last one counts.
        results: what is no module's, in order.
        factors: packed factors by module, where a checkpoint or a later modifier needs them.
        caches: how keys and values are quantised, by attention module.
        sharing: for each module the first of those that share its B, often itself.
        gradients: g by module, where a modifier of the stage asked for it.
    """

    modules: dict[str, ModuleResult] = field(default_factory=dict)
    results: list[Any] = field(default_factory=list)
    factors: dict[str, PackedLinear] = field(default_factory=dict)
    caches: dict[str, QuantizedCache] = field(default_factory=dict)
    sharing: dict[str, str] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class Original:
    """A block before any modifier of the stage changed it, and for each batch of each dense stream its calls."""

    block: nn.Module
    calls: Mapping[StreamKey, Sequence[tuple[LayerCall, ...]]]


class Snapshot(Protocol):
    """Keeps the state of a training now and then, so that a run that is taken up again goes on from the last one."""

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that was saved last, by this run or by one that was cut short; None where there is none."""

    def due(self) -> bool:
        """Whether it is time to save."""

    def save(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Keep tensors and plain data in the place of those before. Raises OSError where the disk is full."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockContext:
    """All that a step may look at. It changes nothing of it: what it wants changed it returns.

    Attributes:
        stacks: all stacks of the model, and `stack` the one that the block is in.
        blocks: numbers of all blocks of lists that calibration reaches, by which a step at the end of a stage can look at them.
        block: number of the block; None at the end of a stage.
        streams: activations at the door of the block.
        statistics: by entry and module, of entries whose `needs.feeds` says so.
        readers: for each module the first that reads the same tensor, in the order in which modules are called.
        layer_readers: the same, where all experts of a layer read one tensor because every one is called on all tokens.
        moe: what becomes of experts that too few tokens reach.
        sharing: for each module that shares its weight with others all of them, by name.
        original: the block as it was, where a modifier needs it.
        keep_factors: whether a modifier of the recipe reads factors.
        progress: notes that a row is done, and returns the share of all rows' work that is.
        reached: that share once a part, 0 to 1, of the row that is worked on now is done.
        snapshot: where a training, by its step's key, keeps its state; None where a run cannot be taken up again.
    """

    model: nn.Module
    stacks: Stacks
    blocks: Sequence[int]
    stack: Stack
    block: int | None
    weights: WeightStore
    state: State
    storage: Storage
    streams: Mapping[StreamKey, Activations]
    tokens: Mapping[CalibrationSpec, InputSet]
    statistics: Mapping[str, Statistics]
    readers: Mapping[str, str]
    layer_readers: Mapping[str, str]
    moe: MoeSpec
    sharing: Mapping[str, Sequence[str]]
    original: Original | None
    keep_factors: bool
    hooks: Hooks
    observer: Observer
    progress: Callable[[Row], float]
    reached: Callable[[Row, float], float]
    snapshot: Callable[[str], Snapshot | None]

    @property
    def index(self) -> int:
        """Number of the block."""
        assert self.block is not None
        return self.block

    @property
    def module(self) -> nn.Module:
        """The block."""
        return self.stack.block(self.index)

    @property
    def name(self) -> str:
        """Full name of the block, or `model`."""
        return "model" if self.block is None else self.stack.block_name(self.block)

    def reader(self, name: str) -> str:
        """The first module that reads what this one reads."""
        return self.readers.get(name, name)

    def fed_with(self, name: str, share: Share) -> str:
        """The first module that reads what this one is calibrated on."""
        return (self.layer_readers if share.every_expert else self.readers).get(name, name)

    def users(self, name: str) -> Sequence[str]:
        """All modules that have this one's weight, itself among them."""
        return self.sharing.get(name, (name,))

    def stream(self, share: Share, kind: StreamKind) -> Activations:
        """The share's activations on that model."""
        return self.streams[share.stream_key(kind)]

    def batches(self, spec: CalibrationSpec) -> list[Batch]:
        """What the model is called with, on its device."""
        return [on_device(batch, self.model) for batch in self.tokens[spec].batches(spec.batch_size)]

    def statistic(self, share: Share, shape: ModuleShape, first: int = 0) -> Statistic:
        """A new accumulator of the share's modifier, which knows where the windows from the number `first` on are from."""
        spec = share.entry.config.calibration
        assert spec is not None
        made: Any = share.modifier
        statistic: Statistic = made.statistic(shape)
        if isinstance(statistic, KnowsOrigins):
            statistic.expect(self.tokens[spec].origins, first)
        return statistic

    def told(self, name: str, row: Row | None = None) -> SolveProgress:
        """What tells the observer of steps on the way, and where nothing runs beside this `row` how much is done by then."""

        def progress(done: int, at_most: int, loss: float) -> None:
            share = None if row is None else self.reached(row, done / max(at_most, 1))
            self.observer(SolveProgressed(name, done, at_most, loss, share))

        return progress


@dataclass(frozen=True, slots=True)
class Trial:
    """CPU seconds of one thread: of a row's solve, and of one token in the statistic of its inputs."""

    solve: float
    token: float


class Kind(ABC):
    """How modifiers of one kind are planned and run.

    Class attribute `chooses`: whether `targets` choose among what entries before have made, so that other linear modules that they
    match are no matter.
    """

    chooses: ClassVar[bool] = False

    @abstractmethod
    def plan(self, planning: Planning, modifier: Any) -> Planned:
        """Rows for the entry. Raises PlanError, or returns several problems."""

    def conflicts(self, where: Mapping[str, str], rows: Sequence[Row]) -> list[str]:  # noqa: ARG002 - for those that have some
        """What is wrong between rows of this kind, as messages; `where` is each entry's place, by its key."""
        return []

    def units(self, shares: Sequence[Share], context: BlockContext) -> Iterator[Unit]:
        """The steps of shares that are taken together, in order: by default one."""
        key = "+".join(share.entry.key for share in shares)
        yield Unit(f"{key}/{context.name}", tuple(shares))

    def trial(self, modifier: Any, row: Any) -> Trial | None:  # noqa: ARG002 - for those that can be tried
        """What one row takes on this machine, on random numbers in the place of weights and data; None without an answer."""
        return None

    @abstractmethod
    def run(self, unit: Unit, context: BlockContext) -> Changes:
        """Do one step, without changing anything. Raises ArmorError."""


def calibration_tokens(spec: CalibrationSpec) -> int:
    """Tokens that a calibration takes at most."""
    samples = spec.samples.at_most if isinstance(spec.samples, AtMost) else spec.samples
    return samples * spec.sequence_length


def entry_name(key: str) -> str:
    """A modifier's name in its recipe, from its entry's key."""
    return key.split(".", 2)[-1]


def once(text: str, names: Sequence[str]) -> str:
    """One message for modules that are refused for the same reason: it names the first and counts the others."""
    others = f" (and {len(names) - 1} more like it: {', '.join(names[1:4])}{', …' if len(names) > 4 else ''})"
    return text.replace("{}", names[0]) + (others if len(names) > 1 else "")


@contextmanager
def located(entry: ModifierEntry, name: str) -> Iterator[None]:
    """Errors inside tell the recipe's line, the modifier and the module or unit, once each."""
    try:
        yield
    except ArmorError as error:
        text = str(error)
        places = [place for place in (entry.where, entry.name) if f"{place}: " not in text]
        places += [] if re.search(rf"{re.escape(name)}(?![\w.])", text) else [name]
        raise type(error)(": ".join([*places, text])) from error
