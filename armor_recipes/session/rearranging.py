"""Reorder channels inside a decoder layer: planned on shapes, applied in place, and undone where the layer's output shows it."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.errors import ArmorError, NumericalError, PlanError
from armor_recipes.modifiers.base import Chain, ModuleShape, Rearrangement, Rearranger, Statistic
from armor_recipes.recipe import ModifierEntry
from armor_recipes.session.capture import Stream
from armor_recipes.session.hooks import Hooks, feeding
from armor_recipes.session.layers import DecoderLayers
from armor_recipes.session.targets import tied_to

#: A reordered module or layer must give its output again up to this share of the output's norm, in float32.
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class RearrangePlan:
    """One chain of modules whose channels will be reordered, in decoder layer `layer`. `modifier` is an entry's key."""

    modifier: str
    stage: str
    layer: int
    chain: Chain
    flops: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class RearrangeResult:
    """What was reordered: shares of the score that masks keep in the old and in the new order, and the order itself by its hash.

    `moved` counts the consumer's columns in another place than before; `order_sha256` is that of the old columns' numbers
    in the new order, as int64.
    """

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
class RearrangeJob:
    """A rearranger's entry with the chains it reorders in a layer, and the stream on which it observes their inputs.

    `along` has numbers `(O,)` for each row of modules, by name: those of producers are put into the new order.
    """

    entry: ModifierEntry
    rearranger: Rearranger[Any]
    chains: Sequence[Chain]
    stream: Stream
    along: MutableMapping[str, Tensor]


def plan_chains(
    entry: ModifierEntry,
    rearranger: Rearranger[Any],
    model: nn.Module,
    layers: DecoderLayers,
    consumers: Iterable[str],
    *,
    itemsize: int,
) -> list[RearrangePlan]:
    """The chains of all targeted consumers, checked and costed. Raises PlanError."""
    return [
        _plan_chain(entry, rearranger, model, layers, (name, *rearranger.producers(name)), itemsize)
        for name in consumers
    ]


def _plan_chain(
    entry: ModifierEntry,
    rearranger: Rearranger[Any],
    model: nn.Module,
    layers: DecoderLayers,
    names: tuple[str, ...],
    itemsize: int,
) -> RearrangePlan:
    shapes = [_linear_shape(model, name, names[0], itemsize) for name in names]
    found = {layers.layer_of(name) for name in names}
    layer = found.pop()
    if layer is None or found:
        raise PlanError(f"{', '.join(names)} are not inside one decoder layer; add {names[0]!r} to `ignore`")
    chain = Chain(shapes[0], tuple(shapes[1:]), _head_dim(model))
    cost = rearranger.plan(chain)
    return RearrangePlan(entry.key, entry.stage, layer, chain, cost.flops, cost.peak_bytes)


def _linear_shape(model: nn.Module, name: str, consumer: str, itemsize: int) -> ModuleShape:
    module = dict(model.named_modules()).get(name)
    if not isinstance(module, nn.Linear):
        what = "there is no such module" if module is None else f"it is a {type(module).__name__}"
        raise PlanError(f"{name} is to make the inputs of {consumer}, but {what}; correct `producers`")
    other = tied_to(model, name)
    if other is not None:
        raise PlanError(f"the weight of {name} is tied to {other}; add {consumer!r} to `ignore`")
    return ModuleShape(name, module.out_features, module.in_features, itemsize)


def _head_dim(model: nn.Module) -> int | None:
    """Size of an attention head by the model's config, or None."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    given = getattr(config, "head_dim", None)
    hidden, heads = (getattr(config, name, None) for name in ("hidden_size", "num_attention_heads"))
    if isinstance(given, int):
        return given
    return hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None


def chain_conflicts(where: Mapping[str, str], chains: Sequence[RearrangePlan]) -> list[str]:
    """Modules whose rows or columns two chains would reorder, as messages. `where` is each entry's place, by its key."""
    seen: dict[tuple[str, str], RearrangePlan] = {}
    problems = []
    for plan in chains:
        consumer, *producers = plan.chain.names
        for role in (("columns", consumer), *(("rows", name) for name in producers)):
            earlier = seen.setdefault(role, plan)
            if earlier is not plan:
                problems.append(
                    f"{where[plan.modifier]}: the {role[0]} of {role[1]} are already reordered for "
                    f"{earlier.chain.consumer.name} ({where[earlier.modifier]}); narrow the targets of one of them"
                )
    return problems


def rearrange_layer(
    job: RearrangeJob, model: nn.Module, layers: DecoderLayers, index: int, hooks: Hooks
) -> list[RearrangeResult]:
    """Observe the consumers' inputs in one pass, then reorder chain by chain, each checked on the first batch.

    Raises PlanError, with the modules as they were, where a reordered layer is another function.
    """
    statistics: dict[str, Statistic] = {}
    with hooks:
        for chain in job.chains:
            statistic = statistics[chain.consumer.name] = job.rearranger.statistic(chain.consumer)
            hooks.before(model.get_submodule(chain.consumer.name), feeding(statistic))
        job.stream.observe(index)
    results = []
    for chain in job.chains:
        try:
            results.append(_rearrange(job, chain, model, layers.names[index], index, statistics, hooks))
        except ArmorError as error:
            raise type(error)(f"{job.entry.where}: {job.entry.name}: {chain.consumer.name}: {error}") from error
    return results


def _rearrange(
    job: RearrangeJob,
    chain: Chain,
    model: nn.Module,
    layer: str,
    index: int,
    statistics: Mapping[str, Statistic],
    hooks: Hooks,
) -> RearrangeResult:
    started = time.perf_counter()
    consumer = model.get_submodule(chain.consumer.name)
    assert isinstance(consumer, nn.Linear)
    statistic = statistics[chain.consumer.name]
    found = job.rearranger.rearrange(chain, consumer.weight.detach(), statistic)
    before = _outputs(job.stream, index, consumer, hooks)
    _reorder(model, chain, found.columns, found.rows)
    try:
        _check_same(before, _outputs(job.stream, index, consumer, hooks), chain, layer)
    except ArmorError:
        _reorder(model, chain, found.columns.argsort(), found.rows.argsort())
        raise
    for producer in chain.producers:
        if producer.name in job.along:
            job.along[producer.name] = job.along[producer.name][found.rows]
    return _result(job, chain, found, statistic, time.perf_counter() - started)


def _result(
    job: RearrangeJob, chain: Chain, found: Rearrangement, statistic: Statistic, seconds: float
) -> RearrangeResult:
    order = found.columns.to("cpu", torch.int64)
    return RearrangeResult(
        modifier=job.entry.key,
        consumer=chain.consumer.name,
        producers=tuple(producer.name for producer in chain.producers),
        kept_before=found.kept[0],
        kept_after=found.kept[1],
        moved=int((order != torch.arange(len(order))).sum()),
        order_sha256=hashlib.sha256(order.numpy().astype("<i8").tobytes()).hexdigest(),
        tokens=statistic.tokens,
        seconds=seconds,
    )


def _reorder(model: nn.Module, chain: Chain, columns: Tensor, rows: Tensor) -> None:
    """The consumer's columns, and the producers' rows and biases, in place."""
    weight = model.get_parameter(f"{chain.consumer.name}.weight").data
    weight.copy_(weight[:, columns])
    for producer in chain.producers:
        for parameter in model.get_submodule(producer.name).parameters():
            parameter.data.copy_(parameter.data[rows])


def _outputs(stream: Stream, index: int, consumer: nn.Module, hooks: Hooks) -> list[Tensor]:
    """Of the consumer and of the whole layer, on the first batch of the stream."""
    seen: list[Tensor] = []
    with hooks:
        hooks.after(consumer, lambda _, __, output: seen.append(output))
        seen.append(next(stream.run(index)))
    return seen


def _check_same(before: Sequence[Tensor], after: Sequence[Tensor], chain: Chain, layer: str) -> None:
    """Raise PlanError where an output is another than it was, beyond the rounding of its dtype."""
    if not all(bool(output.isfinite().all()) for output in (*before, *after)):
        raise NumericalError(
            f"the output of {layer} is not finite; check the model's weights, or set a wider compute_dtype"
        )
    worst = max(_difference(new, old) for new, old in zip(after, before, strict=True))
    if worst > max(_TOLERANCE, 4 * torch.finfo(before[0].dtype).eps):
        made = " and ".join(producer.name for producer in chain.producers)
        raise PlanError(
            f"with the channels between {made} and {chain.consumer.name} reordered {layer} gives another output (relative "
            f"difference {worst:.3g}): something between them mixes or scales channels, or reads them elsewhere. The weights "
            f"are as they were; correct `producers`, or add {chain.consumer.name!r} to `ignore`"
        )


def _difference(new: Tensor, old: Tensor) -> float:
    size = float(old.float().norm())
    error = float((new.float() - old.float()).norm())
    return error / size if size > 0 else error
