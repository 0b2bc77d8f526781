"""`Modifier`: changes linear modules one by one. Modules of a block are solved at once where cores are free."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from armor_recipes.calibration.inputs import leading
from armor_recipes.checkpoint.config import LayerSpec
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.checkpoint.quantized import Scheme
from armor_recipes.compute.threads import in_order as each_in_order
from armor_recipes.errors import PlanError, UnfitError
from armor_recipes.events import ModuleFinished
from armor_recipes.model.blocks import inner_name
from armor_recipes.model.calls import LayerCall
from armor_recipes.model.experts import every_expert, in_parts
from armor_recipes.model.hooks import Hooks
from armor_recipes.model.replay import inputs_of
from armor_recipes.model.views import view
from armor_recipes.modifiers.base import (
    AnyModifier,
    C,
    CalibratedConfig,
    CoreType,
    Estimate,
    KnowsOrigins,
    ModuleShape,
    Needs,
    SolveProgress,
    Statistic,
    StoredAs,
    WithGradients,
    fed_with_inputs,
    join_shapes,
)
from armor_recipes.modifiers.kinds.changes import Changes, ModuleResult, loaded_weight
from armor_recipes.modifiers.kinds.contract import (
    BlockContext,
    Kind,
    Planned,
    Planning,
    Row,
    Share,
    Trial,
    Unit,
    located,
)
from armor_recipes.modifiers.kinds.experts import ExpertBelow, fed
from armor_recipes.modifiers.kinds.pool import in_order
from armor_recipes.modifiers.kinds.served import served_shapes
from armor_recipes.solver import Factorization, relative_error

GIVEN = "model"
"""What stands for an entry's key in rows and results of what came packed or quantised with the model."""


@dataclass(frozen=True, slots=True)
class ModulePlan(Row):
    """What will happen to one module. `modifier` is an entry's key, `layer` counts from 0.

    `bytes_before` are those of the dense weight, `bytes_after` those of the weight as stored if nothing else follows.
    `stored_as`: `packed` (core and factors) or `dense` (a plain weight: masked, or the product A·S·B of what cannot be packed).
    `core` is what a packed core's kept values are, `group_size` how many of them have one scale (None: a row's), `pattern` the
    sparsity that is brought in. `uses` are other modules, of this block or later ones, whose weight is this one. A module has a row
    for each modifier that changes it, the last one counts.
    """

    section: ClassVar[str] = "modules"

    name: str
    modifier: str
    stage: str
    layer: int
    d_out: int
    d_in: int
    block_size: tuple[int, int] | None
    blocks: tuple[int, int] | None
    bytes_before: int
    bytes_after: int
    factor_bytes: int
    flops: float
    peak_bytes: int
    stored_as: StoredAs = "dense"
    core: CoreType = "float"
    group_size: int | None = None
    activations: str | None = None
    pattern: str | None = None
    uses: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, planning: Planning, modifier: AnyModifier[Any], shape: ModuleShape, layer: int, cost: Estimate
    ) -> ModulePlan:
        """A modifier's answer for one module, as a row."""
        block = cost.block_size
        return cls(
            name=shape.name,
            modifier=planning.entry.key,
            stage=planning.entry.stage,
            layer=layer,
            d_out=shape.d_out,
            d_in=shape.d_in,
            block_size=block,
            blocks=None if block is None else (shape.d_out // block[0], shape.d_in // block[1]),
            bytes_before=shape.dense_bytes,
            bytes_after=cost.stored_bytes,
            factor_bytes=cost.factor_bytes,
            flops=cost.flops,
            peak_bytes=cost.peak_bytes,
            stored_as=cost.stored_as,
            core=cost.core,
            group_size=cost.group_size,
            activations=cost.activations,
            pattern=modifier.sparsity,
            uses=planning.uses.get(shape.name, ()),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, with the percentage."""
        own = {one.name: getattr(self, one.name) for one in fields(self)}  # `asdict` copies, in three times as long
        if self.activations is None:
            del own["activations"]  # most plans have none, and are what they were before there were any
        return {**own, "overhead_percent": round(self.overhead_percent, 3)}

    @property
    def overhead_percent(self) -> float:
        """Bytes of A and B as a percentage of the dense weight's."""
        return 100.0 * self.factor_bytes / self.bytes_before

    @property
    def itemsize(self) -> int:
        """Bytes of one stored value of the dense weight."""
        return self.bytes_before // (self.d_out * self.d_in)

    @property
    def shape(self) -> ModuleShape:
        """The module, with its planned block size."""
        return ModuleShape(self.name, self.d_out, self.d_in, self.itemsize, (), self.block_size)

    @property
    def spec(self) -> LayerSpec | None:
        """How config.json will describe the module; None where it is stored dense."""
        if self.stored_as != "packed" or self.block_size is None:
            return None
        return LayerSpec(self.block_size, self.core, None, self.group_size, None, self.activations)

    @property
    def quantized(self) -> Scheme | None:
        """What a plain weight is quantised to; None where it is not."""
        return None

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """The weight that is replaced."""
        return {self.name: (self.d_out, self.d_in)}

    @property
    def takes(self) -> tuple[str, ...]:
        """The module."""
        return (self.name,)

    @property
    def observed(self) -> tuple[ModuleShape, ...]:
        """The module."""
        return (self.shape,)


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


#: Input rows of a trial's statistic at least, and the windows that they make.
_TRIED_TOKENS, _TRIED_WINDOWS = 512, 8


class Solving(Kind):
    """Solves modules each by itself, or those as one that their modifier groups."""

    def plan(self, planning: Planning, modifier: Modifier[Any]) -> Planned:
        """A row for each targeted module inside a block."""
        names = [name for name in planning.names if planning.stacks.block_of(name) is not None]
        plain = [_shape(planning, name) for name in names]
        shapes = served_shapes(plain, planning.linears, planning.facts, planning.recipe)
        together = modifier.among(shapes)
        return planning.each(
            planning.names, partial(_plan_module, planning, together, {shape.name: shape for shape in shapes})
        )

    def trial(self, modifier: Modifier[Any], row: ModulePlan) -> Trial:
        """Feed a statistic, and solve the module, as a run does."""
        generator, shape = torch.Generator().manual_seed(0), row.shape
        statistic: Any = modifier.statistic(shape)
        if isinstance(statistic, KnowsOrigins):
            statistic.expect((0,) * _TRIED_WINDOWS)
        x = torch.randn(
            _TRIED_WINDOWS, max(_TRIED_TOKENS, shape.d_in) // _TRIED_WINDOWS, shape.d_in, generator=generator
        )
        pair = (x, x) if modifier.needs.dense == "block" else (x,)
        begun = time.thread_time()
        statistic.update(*pair)
        fed = time.thread_time()
        weight = torch.randn(shape.d_out, shape.d_in, generator=generator)
        given = WithGradients(statistic, torch.ones(shape.d_out)) if modifier.needs.gradients else statistic
        started = time.thread_time()
        outcome = modifier.solve(shape, weight, given, None)
        if outcome.factorization is not None:
            loaded_weight(PackedLinear.from_factorization(outcome.factorization, torch.bfloat16), weight.dtype)
        modifier.loss(weight, given, outcome.weight)
        relative_error(weight, outcome.weight)
        return Trial(time.thread_time() - started, (fed - begun) / x[..., 0].numel())

    def units(self, shares: Sequence[Share], context: BlockContext) -> Iterator[Unit]:
        """All modules at once; where they are matched those that read the same tensor, in the order in which the block calls them.

        Each of these sees what those before it have become. Matched on what they were, it would make up for errors a second time.
        """
        if shares[0].modifier.needs.dense != "block":
            yield from super().units(shares, context)
            return
        order = {name: place for place, name in enumerate(context.readers)}
        planned = [(share, row) for share in shares for row in share.rows]
        groups: dict[str, dict[str, list[ModulePlan]]] = {}
        for share, row in sorted(planned, key=lambda pair: order[pair[1].name]):
            groups.setdefault(context.readers[row.name], {}).setdefault(share.entry.key, []).append(row)
        by_key = {share.entry.key: share for share in shares}
        for reader, group in groups.items():
            taken = tuple(replace(by_key[key], rows=tuple(rows)) for key, rows in group.items())
            yield Unit(f"{'+'.join(group)}/{reader}", taken)

    @torch.no_grad()
    def run(self, unit: Unit, context: BlockContext) -> Changes:
        """Solve the unit's modules and round them as they are stored."""
        worked = [_tasks(share, context) for share in unit.shares]
        tasks = [task for work in worked for task in work.tasks]
        rows = {row.name: row for share in unit.shares for row in share.rows}
        solved: list[_Solved] = []
        costs = [sum(rows[shape.name].flops for shape in task.shapes) for task in tasks]
        device = next(context.model.parameters()).device
        for found in in_order([partial(_solve, task, context) for task in tasks], device, costs):
            for one in found:
                share, result = context.progress(rows[one.result.name]), one.result
                context.observer(
                    ModuleFinished(result.name, result.losses[0], result.stored_loss, result.seconds, share)
                )
            solved += found
        below = tuple(one for work in worked for one in work.below)
        for left in (expert for expert in below if expert.done == "skip"):
            context.progress(rows[left.name])
        keep = context.storage.packed or context.keep_factors
        return Changes(
            step=unit.key,
            weights={f"{one.result.name}.weight": one.weight for one in solved},
            factors={one.result.name: one.factors if keep else None for one in solved},
            packed=context.storage.packed,
            sharing={shape.name: task.shapes[0].name for task in tasks for shape in task.shapes},
            modules={one.result.name: one.result for one in solved},
            results=below,
        )


class Modifier(AnyModifier[C]):
    """One method of changing linear modules, each by itself.

    It is asked for `plan` (on shapes alone, before any weight is read), `statistic` (an accumulator for the module's inputs),
    then `solve`.
    """

    kind: ClassVar[Kind] = Solving()

    @property
    def needs(self) -> Needs:
        """Inputs from where `propagate` says: as compressed so far, from the dense model, or both (`matched`)."""
        needs = fed_with_inputs(self.config, gradients=self.needs_gradients)
        if needs.feeds == "compressed":
            return needs
        if needs.because == "propagate: matched":
            return replace(needs, streams=("compressed", "dense"), feeds=None, dense="block", joint=True)
        return replace(needs, joint=True)

    @property
    def sparsity(self) -> str | None:
        """The config's `pattern`, where it has one."""
        return self.config.pattern if isinstance(self.config, CalibratedConfig) else None

    @property
    def needs_gradients(self) -> bool:
        """Whether `solve` and `loss` get their statistic in a `WithGradients`; costs a backward pass through the model."""
        return False

    def groups(self, modules: Sequence[tuple[ModuleShape, str]]) -> list[list[ModuleShape]]:
        """Which of a block's modules are solved as one, stacked along their rows; each comes with the first that reads its input.

        Only modules that read the same input can be. By default each is solved by itself.
        """
        return [[shape] for shape, _ in modules]

    def among(self, modules: Sequence[ModuleShape]) -> Self:  # noqa: ARG002 - for those that ask
        """What plans these modules, which are all of an entry: itself, unless what one is given depends on the others.

        Raises PlanError.
        """
        return self

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


def _plan_module(
    planning: Planning, modifier: Modifier[Any], shapes: Mapping[str, ModuleShape], name: str
) -> ModulePlan:
    layer = planning.stacks.block_of(name)
    if layer is None:
        raise UnfitError(
            f"{name} is not inside a decoder layer, where calibration inputs are taken", f"add {name!r} to `ignore`"
        )
    shape = shapes[name]
    return ModulePlan.of(planning, modifier, shape, layer, modifier.plan(shape))


def _shape(planning: Planning, name: str) -> ModuleShape:
    linear = planning.linears.modules[name]
    return ModuleShape(name, linear.out_features, linear.in_features, planning.itemsize)


@dataclass(frozen=True, slots=True)
class _Task:
    """Modules that are solved as one: a single one, or several that read the same input and share its factor."""

    share: Share
    shapes: tuple[ModuleShape, ...]
    statistic: Any
    tokens: int


@dataclass(frozen=True, slots=True)
class _Work:
    """A share's tasks, and experts that too few tokens reach."""

    tasks: tuple[_Task, ...]
    below: tuple[ExpertBelow, ...]


@dataclass(frozen=True, slots=True)
class _Solved:
    """A module's result, the weight in compute dtype `(O, I)` that takes its place, and its factors if it has any."""

    result: ModuleResult
    weight: Tensor
    factors: PackedLinear | None


def _tasks(share: Share, context: BlockContext) -> _Work:
    """One for each module, or for all that the modifier groups."""
    modifier: Any = share.modifier
    shapes = [row.shape for row in share.rows]
    if share.modifier.needs.dense == "block":
        statistic = _observe_pairs(share, context)
        statistics: Mapping[str, Statistic] = dict.fromkeys((shape.name for shape in shapes), statistic)
    else:
        statistics = context.statistics.get(share.entry.key, {})
    given = fed(share, shapes, statistics, context)
    groups = modifier.groups([(s, context.reader(s.name)) for s in shapes if s.name not in given.skipped])
    tasks = [
        _Task(
            share,
            tuple(group),
            _statistic(share, group, given.statistics, context),
            given.tokens.get(group[0].name, 0),
        )
        for group in groups
    ]
    return _Work(tuple(tasks), given.below)


def _statistic(
    share: Share, group: Sequence[ModuleShape], statistics: Mapping[str, Statistic], context: BlockContext
) -> Statistic | None:
    """The group's input statistic, with the gradients at its outputs where the modifier asks for them."""
    found = statistics.get(group[0].name)
    if not share.modifier.needs.gradients:
        return found
    return WithGradients(found, torch.cat([context.state.gradients[shape.name] for shape in group]))


def _observe_pairs(share: Share, context: BlockContext) -> Any:
    """What modules read on the compressed stream, with what the dense block's read on the same tokens beside it.

    Several batches pass at once, and what was seen of each is added in their order.
    """
    name, shape = share.rows[0].name, share.rows[0].shape
    statistic: Any = context.statistic(share, shape)
    original = context.original
    assert original is not None
    inner = inner_name(context.name, name)
    dense, compressed = original.calls[share.stream_key("dense")], context.stream(share, "compressed")
    paddings, index = compressed.paddings(context.index), context.index
    batches = list(zip(dense, compressed.uses(index), paddings, strict=True))
    firsts = [0, *accumulate(len(leading(batch)) for batch in compressed.batches)]

    def passed(place: int, *, once: bool) -> tuple[Any, bool]:
        calls, now, padding = batches[place]
        wanted = _read_by(inner, calls, original.block, once=once)
        found = _read_by(inner, now, context.module, once=once)
        if [x.shape for x in found] != [x.shape for x in wanted]:
            raise PlanError(
                f"{share.entry.where}: {share.entry.name}: {name}: other tokens reach it than reach the dense model's module, so "
                f"there is nothing to match; choose another `propagate` for it, or add {name!r} to `ignore` (experts: or set "
                "`calibration.experts: all`)"
            )
        part: Any = context.statistic(share, shape, firsts[place])
        for x, target in zip(found, wanted, strict=True):
            for kept in zip(padding.pieces(x), padding.pieces(target, x), strict=True):
                for pair in in_parts(name, *kept):
                    part.update(*pair)
        return part, len(calls) == len(found) == 1

    with every_expert(original.block, context.module, wanted=share.every_expert):
        part, once = passed(0, once=False)
        statistic.merge(part)
        on_cpu = next(context.model.parameters()).device.type == "cpu"
        for part, _ in each_in_order(partial(passed, once=once), range(1, len(batches)), on_cpu=on_cpu):
            statistic.merge(part)
    return statistic


def _read_by(inner: str, calls: Sequence[LayerCall], block: nn.Module, *, once: bool) -> list[Tensor]:
    """What a module inside a block reads in calls of the block; in a view of it, so that threads do not see each other's."""
    module = block.get_submodule(inner)
    names = [name for name, other in block.named_modules(remove_duplicate=False) if other is module]
    seen = view(block, {}, copied=[name for name in names if name])
    modules = [seen.get_submodule(name) for name in names]
    return [x for call in calls for x in inputs_of(modules, call, seen, Hooks(), once=once)]


@torch.no_grad()
def _solve(task: _Task, context: BlockContext, stoppable: Callable[[SolveProgress], SolveProgress]) -> list[_Solved]:
    """Solve one task and round the result to the stored dtype. Errors name the recipe's line and the modules."""
    modifier: Any = task.share.modifier
    weights = [context.weights.read(f"{shape.name}.weight") for shape in task.shapes]
    shape = join_shapes(task.shapes)
    started = time.perf_counter()
    with located(task.share.entry, shape.name):
        stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
        outcome: Outcome = modifier.solve(shape, stacked, task.statistic, stoppable(context.told(shape.name)))
        rows = [s.d_out for s in task.shapes]
        seconds = (time.perf_counter() - started) / len(weights)
        given = task.statistic
        statistics = given.split(rows) if modifier.needs.gradients else [given] * len(rows)
        parts = zip(task.shapes, weights, statistics, outcome.split(rows), strict=True)
        return [_stored(task, context, *part, seconds) for part in parts]


def _stored(
    task: _Task,
    context: BlockContext,
    shape: ModuleShape,
    weight: Tensor,
    statistic: Any,
    outcome: Outcome,
    seconds: float,
) -> _Solved:
    """What the checkpoint will hold, and the weight in compute dtype that a loader makes of it."""
    storage, modifier = context.storage, task.share.modifier
    found = outcome.factorization
    factors = None if found is None else PackedLinear.from_factorization(found, storage.factor_dtype)
    if factors is not None and storage.packed:
        stored = loaded_weight(factors, weight.dtype)
    else:
        stored = outcome.weight.to(storage.dtype).to(weight.dtype)
    measure: Any = modifier
    result = ModuleResult(
        name=shape.name,
        modifier=task.share.entry.key,
        losses=outcome.losses,
        stored_loss=measure.loss(weight, statistic, stored),
        error=relative_error(weight, stored),
        tokens=task.tokens,
        iterations=outcome.iterations,
        stop_reason=outcome.stop_reason,
        counts=outcome.counts if bool(weight.any()) else {**outcome.counts, "zero_weight": 1},
        seconds=seconds,
        measures=outcome.measures,
    )
    return _Solved(result, stored, factors)
