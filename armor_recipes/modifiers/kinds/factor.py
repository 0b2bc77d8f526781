"""`FactorModifier`: gives the factors of a module another form, around the product that they make."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import PlanError, UnfitError
from armor_recipes.events import ModuleFinished
from armor_recipes.modifiers.base import (
    AnyModifier,
    C,
    Estimate,
    ModuleShape,
    Needs,
    SolveProgress,
    Statistic,
    fed_with_inputs,
    join_shapes,
)
from armor_recipes.modifiers.kinds.changes import Changes, FactorChange, loaded_weight
from armor_recipes.modifiers.kinds.contract import (
    BlockContext,
    Kind,
    Planned,
    Planning,
    Share,
    Unit,
    entry_name,
    located,
)
from armor_recipes.modifiers.kinds.experts import ExpertBelow, Fed, fed, left_alone
from armor_recipes.modifiers.kinds.module import ModulePlan
from armor_recipes.modifiers.kinds.pool import in_order
from armor_recipes.solver.result import SparseFactors


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


class ChangingFactors(Kind):
    """Changes modules' factors, those that share a B as one."""

    def plan(self, planning: Planning, modifier: FactorModifier[Any]) -> Planned:
        """A row for each module, whose factors the entries before made."""
        if planning.recipe.output.format == "dense":
            raise PlanError(
                "output.format dense stores folded weights, in which factors leave nothing to change: set output.format: "
                "compressed-tensors, or leave it out"
            )
        _check_order(planning)
        made = {row.name: row for row in planning.made(ModulePlan.section)}
        return planning.each(planning.names, partial(_plan_change, planning, modifier, made))

    @torch.no_grad()
    def run(self, unit: Unit, context: BlockContext) -> Changes:
        """Change the factors of the unit's modules."""
        (share,) = unit.shares
        rows = {row.name: row for row in share.rows}
        tasks, below = _tasks(share, context)
        changed: list[_Changed] = []
        for found in in_order(
            [partial(_change, task, context) for task in tasks], next(context.model.parameters()).device
        ):
            changed += found
        for one in changed:
            done, change = context.progress(rows[one.name]), one.change
            context.observer(ModuleFinished(one.name, change.losses[0], change.stored_loss, change.seconds, done))
        names = {one.name for one in changed}
        for row in share.rows:
            if row.name not in names:
                context.progress(row)
        results = context.state.modules
        return Changes(
            step=unit.key,
            weights={f"{one.name}.weight": one.weight for one in changed},
            factors={one.name: one.factors for one in changed},
            packed=True,
            modules={
                one.name: replace(results[one.name], changes=(*results[one.name].changes, one.change))
                for one in changed
            },
            results=below,
        )


class FactorModifier(AnyModifier[C]):
    """Changes the factors that an earlier modifier of this stage or another made, of one module at a time.

    It needs no dense model: the product that the factors give before is what it keeps to. Modules that share their B are
    given to it as one, stacked along their rows, and share what it makes of their B.
    """

    kind: ClassVar[Kind] = ChangingFactors()

    @property
    def needs(self) -> Needs:
        """Factors, and inputs from the model as compressed so far."""
        return fed_with_inputs(self.config, factors=True)

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


def _check_order(planning: Planning) -> None:
    """Raise PlanError where another modifier of the stage would train factors only after this one has changed every block."""
    for other, modifier in planning.before:
        if other.stage == planning.entry.stage and modifier.needs.when == "after":
            raise PlanError(
                f"{other.name} ({other.where}) before it trains the whole model at the end of {other.stage}, after this one has "
                "changed every layer; put this one into a later stage"
            )


def _plan_change(
    planning: Planning, modifier: FactorModifier[Any], rows: Mapping[str, ModulePlan], name: str
) -> ModulePlan:
    made = rows.get(name)
    if made is None or made.stored_as != "packed" or made.block_size is None:
        by = "" if made is None else f" ({entry_name(made.modifier)} stores it dense)"
        raise UnfitError(
            f"no modifier before it makes 2:4 factors for {name}{by}",
            f"put it after an ARMORModifier that takes the module, or add {name!r} to `ignore`",
        )
    shape = made.shape
    row = ModulePlan.of(planning, modifier, shape, made.layer, modifier.plan(shape, made.block_size))
    return replace(row, pattern=made.pattern)


@dataclass(frozen=True, slots=True)
class _Task:
    """Modules whose factors are changed as one: a single one, or several with the same B, of which `packed` has one each."""

    share: Share
    shapes: tuple[ModuleShape, ...]
    packed: tuple[PackedLinear, ...]
    statistic: Statistic | None
    tokens: int
    counts: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class _Changed:
    """A module's new factors, and the weight in compute dtype `(O, I)` that a loader makes of them."""

    name: str
    change: FactorChange
    weight: Tensor
    factors: PackedLinear


def _tasks(share: Share, context: BlockContext) -> tuple[list[_Task], tuple[ExpertBelow, ...]]:
    """One for each B, and experts that too few tokens reach. Those that were skipped before have no factors."""
    without = left_alone(context.state)
    rows = [row for row in share.rows if row.name not in without]
    given = fed(share, [row.shape for row in rows], context.statistics.get(share.entry.key, {}), context)
    groups: dict[str, list[ModulePlan]] = {}
    for row in rows:
        if row.name not in given.skipped:
            groups.setdefault(context.state.sharing[row.name], []).append(row)
    sharers = Counter(context.state.sharing.values())
    return [_task(share, found, given, context, sharers[owner]) for owner, found in groups.items()], given.below


def _task(share: Share, rows: Sequence[ModulePlan], given: Fed, context: BlockContext, sharers: int) -> _Task:
    """A B that only some of its modules (`sharers` of them) change is stored for them, too: that is counted."""
    return _Task(
        share,
        tuple(row.shape for row in rows),
        tuple(context.state.factors[row.name] for row in rows),
        given.statistics.get(rows[0].name),
        given.tokens.get(rows[0].name, 0),
        {} if sharers == len(rows) else {"input_factors_no_longer_shared": 1},
    )


@torch.no_grad()
def _change(task: _Task, context: BlockContext, stoppable: Callable[[SolveProgress], SolveProgress]) -> list[_Changed]:
    """Change the factors of one task and pack them. Errors name the recipe's line and the modules."""
    modifier: Any = task.share.modifier
    shape = join_shapes(task.shapes)
    started = time.perf_counter()
    with located(task.share.entry, shape.name):
        before = SparseFactors.stack([packed.factors() for packed in task.packed])
        outcome = modifier.change(shape, before, task.statistic, stoppable(context.told(shape.name)))
        parts = outcome.factors.split([s.d_out for s in task.shapes])
        packed = [PackedLinear.from_factors(part, context.storage.factor_dtype) for part in parts]
    stored = torch.cat([one.fold(torch.float32) for one in packed])
    change = FactorChange(
        modifier=task.share.entry.key,
        core=packed[0].core,
        losses=outcome.losses,
        stored_loss=modifier.loss(before.dense(), task.statistic, stored),
        tokens=task.tokens,
        iterations=outcome.iterations,
        stop_reason=outcome.stop_reason,
        counts={**outcome.counts, **task.counts},
        seconds=(time.perf_counter() - started) / len(packed),
    )
    dtypes = [context.weights.read(f"{s.name}.weight").dtype for s in task.shapes]
    parts = zip(task.shapes, packed, dtypes, strict=True)
    return [_Changed(s.name, change, loaded_weight(one, dtype), one) for s, one, dtype in parts]
