"""`Rearranger`: reorders channels inside a block, first of all in it, and leaves the block's function as it is."""

from __future__ import annotations

import hashlib
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from armor_recipes.errors import NumericalError, PlanError, UnfitError
from armor_recipes.events import ChannelsReordered
from armor_recipes.model.views import view
from armor_recipes.modifiers.base import AnyModifier, C, Estimate, ModuleShape, Needs, Statistic, fed_with_inputs
from armor_recipes.modifiers.kinds.changes import Changes, StepResult
from armor_recipes.modifiers.kinds.contract import (
    BlockContext,
    Kind,
    Planned,
    Planning,
    Row,
    Share,
    Unit,
    entry_name,
    located,
)
from armor_recipes.modifiers.kinds.experts import Fed, fed

#: A reordered module or block must give its output again up to this share of the output's norm, in float32.
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class RearrangePlan(Row):
    """One chain of modules whose channels will be reordered, in block `layer`. `modifier` is an entry's key."""

    section: ClassVar[str] = "rearrangements"

    modifier: str
    stage: str
    layer: int
    chain: Chain
    flops: float
    peak_bytes: int

    @property
    def shapes(self) -> Mapping[str, tuple[int, int]]:
        """Weights that are reordered."""
        return {m.name: (m.d_out, m.d_in) for m in (self.chain.consumer, *self.chain.producers)}

    @property
    def observed(self) -> tuple[ModuleShape, ...]:
        """The consumer."""
        return (self.chain.consumer,)


@dataclass(frozen=True, slots=True)
class RearrangeResult(StepResult):
    """What was reordered: shares of the score that masks keep in the old and in the new order, and the order itself by its hash.

    `moved` counts the consumer's columns in another place than before; `order_sha256` is that of the old columns' numbers
    in the new order, as int64.
    """

    section: ClassVar[str] = "rearrangements"

    modifier: str
    consumer: str
    producers: tuple[str, ...]
    kept_before: float
    kept_after: float
    moved: int
    order_sha256: str
    tokens: int
    seconds: float


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


class Rearranging(Kind):
    """Reorders a block's chains one after the other, each checked on the first batch, and returns all new orders together."""

    def plan(self, planning: Planning, modifier: Rearranger[Any]) -> Planned:
        """A chain for each targeted consumer."""
        changed = {name: row for row in planning.rows for name in row.takes}
        return planning.each(planning.names, partial(_plan_chain, planning, modifier, changed))

    def conflicts(self, where: Mapping[str, str], rows: Sequence[Row]) -> list[str]:
        """Modules whose rows or columns two chains would reorder."""
        seen: dict[tuple[str, str], Any] = {}
        problems = []
        for plan in rows:
            row: Any = plan
            consumer, *producers = row.chain.names
            for role in (("columns", consumer), *(("rows", name) for name in producers)):
                earlier = seen.setdefault(role, row)
                if earlier is not row:
                    problems.append(
                        f"{where[row.modifier]}: the {role[0]} of {role[1]} are already reordered for "
                        f"{earlier.chain.consumer.name} ({where[earlier.modifier]}); narrow the targets of one of them"
                    )
        return problems

    @torch.no_grad()
    def run(self, unit: Unit, context: BlockContext) -> Changes:
        """Find the orders, on a view of the block. Raises PlanError where a reordered block is another function."""
        (share,) = unit.shares
        weights: dict[str, Tensor] = {}
        gradients: dict[str, Tensor] = {}
        results: list[StepResult] = []
        consumers = [row.chain.consumer for row in share.rows]
        given = fed(share, consumers, context.statistics.get(share.entry.key, {}), context)
        for row in share.rows:
            if row.chain.consumer.name in given.skipped:
                context.progress(row)
                continue
            with located(share.entry, row.chain.consumer.name):
                result = _rearrange(share, row.chain, given, context, weights, gradients)
            results.append(result)
            kept = result.kept_before, result.kept_after
            done = context.progress(row)
            context.observer(ChannelsReordered(result.consumer, *kept, result.seconds, done))
        return Changes(
            step=unit.key, weights=weights, gradients=gradients, results=(*results, *given.below), same_function=True
        )


class Rearranger(AnyModifier[C]):
    """Reorders channels between modules of a layer, whose function stays: that is checked on a calibration batch.

    Its targets are the consumers. It runs in a layer before all modifiers that change the layer.
    """

    kind: ClassVar[Kind] = Rearranging()
    category: ClassVar[str] = "rearrange"

    @property
    def needs(self) -> Needs:
        """Inputs of the consumers, before anything else in the block."""
        return fed_with_inputs(self.config, when="before")

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


def _plan_chain(
    planning: Planning, rearranger: Rearranger[Any], changed: Mapping[str, Row], consumer: str
) -> RearrangePlan:
    names = (consumer, *rearranger.producers(consumer))
    shapes = [_linear_shape(planning, name, names[0]) for name in names]
    found = {planning.stacks.block_of(name) for name in names}
    block = found.pop()
    if block is None or found:
        raise UnfitError(f"{', '.join(names)} are not inside one decoder layer", f"add {consumer!r} to `ignore`")
    _check_untouched(names, changed)
    chain = Chain(shapes[0], tuple(shapes[1:]), planning.facts.head_dim)
    cost = rearranger.plan(chain)
    return RearrangePlan(planning.entry.key, planning.entry.stage, block, chain, cost.flops, cost.peak_bytes)


def _linear_shape(planning: Planning, name: str, consumer: str) -> ModuleShape:
    module = planning.linears.modules.get(name)
    if module is None:
        what = _what_is(planning.model, name)
        raise UnfitError(f"{name} is to make the inputs of {consumer}, but {what}", "correct `producers`")
    others = planning.linears.others(name)
    if others:
        raise UnfitError(f"the weight of {name} is tied to {others[0].described}", f"add {consumer!r} to `ignore`")
    return ModuleShape(name, module.out_features, module.in_features, planning.itemsize)


def _what_is(model: nn.Module, name: str) -> str:
    try:
        return f"it is a {type(model.get_submodule(name)).__name__}"
    except AttributeError:
        return "there is no such module"


def _check_untouched(names: Sequence[str], changed: Mapping[str, Row]) -> None:
    """Raise UnfitError where an earlier stage changed a module to be reordered: its mask and factors have the old order."""
    for name in (name for name in names if name in changed):
        by = changed[name]
        if not by.stage:  # it stands before the recipe
            raise UnfitError(
                f"{name} comes packed or quantised with the model, and only plain weights are reordered",
                "narrow the targets",
            )
        raise UnfitError(
            f"{name} is changed by {entry_name(by.modifier)} in {by.stage}, before it is to be reordered",
            "put the reordering first",
        )


def _rearrange(
    share: Share,
    chain: Chain,
    given: Fed,
    context: BlockContext,
    weights: dict[str, Tensor],
    gradients: dict[str, Tensor],
) -> RearrangeResult:
    """Find one chain's order and add what it gives to `weights` and `gradients`, which hold those of the chains before."""
    started = time.perf_counter()
    rearranger: Any = share.modifier
    statistic = given.statistics[chain.consumer.name]
    found: Rearrangement = rearranger.rearrange(
        chain, _read(f"{chain.consumer.name}.weight", context, weights), statistic
    )
    new = _reordered(chain, found, context, weights)
    _check_same(
        _outputs(share, chain, context, weights), _outputs(share, chain, context, weights | new), chain, context.name
    )
    weights |= new
    for producer in chain.producers:
        if producer.name in context.state.gradients:
            old = gradients.get(producer.name, context.state.gradients[producer.name])
            gradients[producer.name] = old[found.rows]
    order = found.columns.to("cpu", torch.int64)
    return RearrangeResult(
        modifier=share.entry.key,
        consumer=chain.consumer.name,
        producers=tuple(producer.name for producer in chain.producers),
        kept_before=found.kept[0],
        kept_after=found.kept[1],
        moved=int((order != torch.arange(len(order))).sum()),
        order_sha256=hashlib.sha256(order.numpy().astype("<i8").tobytes()).hexdigest(),
        tokens=given.tokens[chain.consumer.name],
        seconds=time.perf_counter() - started,
    )


def _read(parameter: str, context: BlockContext, weights: Mapping[str, Tensor]) -> Tensor:
    return weights[parameter] if parameter in weights else context.weights.read(parameter)


def _reordered(
    chain: Chain, found: Rearrangement, context: BlockContext, weights: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The consumer's columns, and the producers' rows and biases, in the new order."""
    name = f"{chain.consumer.name}.weight"
    new = {name: _read(name, context, weights)[:, found.columns]}
    for producer in chain.producers:
        for own, _ in context.model.get_submodule(producer.name).named_parameters():
            name = f"{producer.name}.{own}"
            new[name] = _read(name, context, {**weights, **new})[found.rows]
    return new


def _outputs(share: Share, chain: Chain, context: BlockContext, weights: Mapping[str, Tensor]) -> list[Tensor]:
    """Of the consumer and of the whole block with other weights, on the first batch of the stream."""
    prefix = f"{context.name}."
    inside = {name.removeprefix(prefix): value for name, value in weights.items()}
    consumer = chain.consumer.name.removeprefix(prefix)
    block = view(context.module, inside, copied=[consumer])
    seen: list[Tensor] = []
    block.get_submodule(consumer).register_forward_hook(lambda _, __, output: seen.append(output))
    (source,) = share.modifier.needs.streams
    (first, *_) = next(context.stream(share, source).uses(context.index))
    seen.append(first.run(block))
    return seen


def _check_same(before: Sequence[Tensor], after: Sequence[Tensor], chain: Chain, block: str) -> None:
    """Raise PlanError where an output is another than it was, beyond the rounding of its dtype."""
    if not all(bool(output.isfinite().all()) for output in (*before, *after)):
        raise NumericalError(
            f"the output of {block} is not finite; check the model's weights, or set a wider compute_dtype"
        )
    worst = max(_difference(new, old) for new, old in zip(after, before, strict=True))
    if worst > max(_TOLERANCE, 4 * torch.finfo(before[0].dtype).eps):
        made = " and ".join(producer.name for producer in chain.producers)
        raise PlanError(
            f"with the channels between {made} and {chain.consumer.name} reordered {block} gives another output (relative "
            f"difference {worst:.3g}): something between them mixes or scales channels, or reads them elsewhere. The weights "
            f"are as they were; correct `producers`, or add {chain.consumer.name!r} to `ignore`"
        )


def _difference(new: Tensor, old: Tensor) -> float:
    size = float(old.float().norm())
    error = float((new.float() - old.float()).norm())
    return error / size if size > 0 else error
