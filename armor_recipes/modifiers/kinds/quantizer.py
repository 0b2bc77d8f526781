"""`Quantizer`: quantises linear modules, the core of those that have factors and the whole weight of others."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from armor_recipes.checkpoint.quantized import QuantizedCache, QuantizedLinear, Scheme
from armor_recipes.errors import NumericalError, PlanError, UnfitError
from armor_recipes.events import ModuleFinished
from armor_recipes.modifiers.base import AnyModifier, C, Estimate, ModuleShape, Needs, Statistic, Tap, fed_with_inputs
from armor_recipes.modifiers.kinds.caches import CachePlan, cache_changes, plan_caches, replaced_caches
from armor_recipes.modifiers.kinds.changes import Changes, ModuleResult
from armor_recipes.modifiers.kinds.contract import (
    BlockContext,
    Kind,
    Overridden,
    Planned,
    Planning,
    Share,
    Unit,
    located,
)
from armor_recipes.modifiers.kinds.experts import fed
from armor_recipes.modifiers.kinds.factor import FactorModifier
from armor_recipes.modifiers.kinds.module import ModulePlan
from armor_recipes.solver import relative_error
from armor_recipes.version import release_of


@dataclass(frozen=True, slots=True)
class QuantizedPlan(ModulePlan):
    """A module whose whole weight is quantised. `scheme` is what to, as JSON of compressed-tensors' config group; `observes` and
    `listens` say whether its inputs and its outputs are looked at.
    """

    scheme: str = ""
    observes: bool = False
    listens: bool = False

    @property
    def observed(self) -> tuple[ModuleShape, ...]:
        """The module, where its activations have scales of their own."""
        return (self.shape,) if self.observes else ()

    @property
    def taps(self) -> tuple[Tap, ...]:
        """What it puts out, where that has scales of its own."""
        return (Tap(self.name, "output", self.d_out),) if self.listens else ()

    @property
    def schemes(self) -> Mapping[str, str]:
        """The scheme of the module."""
        return {self.name: self.scheme}

    @property
    def quantized(self) -> Scheme:
        """What it is quantised to."""
        return Scheme(self.scheme)


@dataclass(frozen=True, slots=True)
class QuantizedOutcome:
    """A quantised weight as it is stored, and what was counted out of the ordinary."""

    packed: QuantizedLinear
    counts: Mapping[str, int] = field(default_factory=dict)


class Quantizing(Kind):
    """Quantises a block's modules: cores as their factor modifier does, plain weights one by one."""

    def plan(self, planning: Planning, modifier: Quantizer[Any]) -> Planned:
        """Rows of cores where an entry before made factors that are stored packed, and of plain weights elsewhere."""
        if planning.recipe.output.format == "dense":
            raise PlanError(
                "output.format dense stores plain weights, and nothing quantised: set output.format: compressed-tensors, or leave "
                "it out"
            )
        made = {row.name: row for row in planning.made(ModulePlan.section)}
        caches = plan_caches(planning, modifier.cache)
        schemes, unknown = _schemes(planning, modifier) if modifier.takes_modules else ({}, {})
        packed: dict[Scheme, list[str]] = {}
        plain: list[str] = []
        for name, scheme in schemes.items():
            has_core = name in made and made[name].stored_as == "packed"
            (packed.setdefault(scheme, []) if has_core else plain).append(name)
        found = [planning.each(plain, partial(_plan_plain, planning, modifier, schemes))]
        for scheme, names in packed.items():
            core = modifier.core(scheme)
            found.append(core.kind.plan(replace(planning, names=tuple(names)), core))
        problems, skipped = planning.unfit(unknown)
        rows: tuple[Any, ...] = tuple(row for one in found for row in one.rows)
        replaced = tuple(made[row.name] for row in rows if isinstance(made.get(row.name), QuantizedPlan))
        old = tuple(replaced_caches(caches, planning))
        return Planned(
            rows + caches,
            tuple(problem for one in found for problem in one.problems) + problems,
            tuple(left for one in found for left in one.skipped) + skipped,
            replaced + tuple(row for row, _ in old),
            (
                *_later_counts(replaced, planning.entry.key),
                *_closer_counts(rows, planning, modifier),
                *(told for _, told in old),
            ),
        )

    def units(self, shares: Sequence[Share], context: BlockContext) -> Iterator[Unit]:
        """The plain weights, then the cores, those of one scheme at once, then keys and values."""
        for share in shares:
            plain = tuple(row for row in share.rows if isinstance(row, QuantizedPlan))
            if plain:
                yield Unit(f"{share.entry.key}/{context.name}/plain", (replace(share, rows=plain),))
            cores: dict[Any, list[ModulePlan]] = {}
            for row in share.rows:
                if not isinstance(row, QuantizedPlan | CachePlan):
                    cores.setdefault((row.core, row.group_size, row.activations), []).append(row)
            for number, rows in enumerate(cores.values()):
                end = f"/{number}" if number else ""
                yield Unit(f"{share.entry.key}/{context.name}{end}", (replace(share, rows=tuple(rows)),))
            caches = tuple(row for row in share.rows if isinstance(row, CachePlan))
            if caches:
                yield Unit(f"{share.entry.key}/{context.name}/cache", (replace(share, rows=caches),))

    @torch.no_grad()
    def run(self, unit: Unit, context: BlockContext) -> Changes:
        """Quantise the unit's modules."""
        (share,) = unit.shares
        if isinstance(share.rows[0], CachePlan):
            return cache_changes(share, unit.key, context)
        if not isinstance(share.rows[0], QuantizedPlan):
            modifier: Any = share.modifier
            core = modifier.core_of_row(share.rows[0])
            changes: Changes = core.kind.run(replace(unit, shares=(replace(share, modifier=core),)), context)
            return changes
        shapes = [row.shape for row in share.rows if row.observes]
        given = fed(share, shapes, context.statistics.get(share.entry.key, {}), context)
        rows = [row for row in share.rows if row.name not in given.skipped]
        together = _read_together(rows, context)
        listened = context.statistics.get(share.entry.key, {})
        solved = [
            _quantize(
                share,
                row,
                (given.statistics.get(row.name), listened.get(f"{row.name}:output")),
                together[row.name],
                context,
            )
            for row in rows
        ]
        for row in share.rows:
            done = context.progress(row)
            result = next((result for result, _, _ in solved if result.name == row.name), None)
            if result is not None:
                context.observer(ModuleFinished(row.name, result.losses[0], result.stored_loss, result.seconds, done))
        return Changes(
            step=unit.key,
            weights={f"{result.name}.weight": weight for result, _, weight in solved},
            factors={result.name: None for result, _, _ in solved},
            quantized={result.name: packed for result, packed, _ in solved},
            modules={result.name: result for result, _, _ in solved},
            results=given.below,
        )


class Quantizer(AnyModifier[C]):
    """Quantises linear modules. What it takes of a module with factors is its core, by a factor modifier of its own."""

    kind: ClassVar[Kind] = Quantizing()

    @property
    def needs(self) -> Needs:
        """Factors, and inputs from the model as compressed so far."""
        return fed_with_inputs(self.config, factors=True)

    @property
    def unties(self) -> bool:
        """Where it takes weights, unless those that do not fit are left out."""
        return self.takes_modules and self.config.unfit != "skip"

    @property
    def cache(self) -> str | None:
        """How keys and values are quantised, as JSON of compressed-tensors' args; None where they are not."""
        return None

    def cached(self, scheme: str, keys: Any, values: Any, dtype: torch.dtype) -> QuantizedCache:
        """What is stored for the cache of an attention module whose keys and values were observed; None where they were not."""
        raise NotImplementedError(f"{type(self).__name__} has no scales for {scheme}")

    @abstractmethod
    def scheme_of(self, name: str, module: Any) -> Scheme | None:
        """What a linear module is quantised to; None where nothing is said of it. Raises PlanError."""

    def outranked(self, name: str, module: Any) -> tuple[Scheme, ...]:  # noqa: ARG002 - for those with several groups
        """Schemes of other groups that match the module, too, and do not count."""
        return ()

    @abstractmethod
    def core(self, scheme: Scheme) -> FactorModifier[Any]:
        """What quantises a core to a scheme."""

    @abstractmethod
    def core_of_row(self, row: ModulePlan) -> FactorModifier[Any]:
        """What quantises a core as it was planned."""

    @abstractmethod
    def plan(self, module: ModuleShape, scheme: Scheme) -> Estimate:
        """Check that the module's weight can be quantised, and estimate the cost; bytes are exact. Raises PlanError."""

    @abstractmethod
    def observes(self, scheme: Scheme) -> bool:
        """Whether a plain weight of that scheme needs a statistic of its inputs."""

    @abstractmethod
    def statistic(self, module: ModuleShape) -> Statistic:
        """A new accumulator for the module's calibration inputs."""

    @abstractmethod
    def quantize(
        self,
        module: ModuleShape,
        weight: Tensor,
        statistic: Any,
        scheme: Scheme,
        together: Sequence[Tensor],
        outputs: Any = None,
    ) -> QuantizedOutcome:
        """Quantise a weight `(O, I)` in the dtype of the checkpoint; `together` are those of modules with the scheme that read the
        same tensor, itself among them, and `outputs` is the range of what it puts out, where that has a static scale. Raises
        NumericalError.
        """


def _later_counts(replaced: Sequence[Any], by: str) -> Iterator[Overridden]:
    """What entries before asked of modules whose last quantiser is another one: that alone is done, as in llm-compressor."""
    for row in replaced:
        yield Overridden(row.name, row.quantized.described, row.modifier, by)


def _closer_counts(rows: Sequence[Any], planning: Planning, modifier: Quantizer[Any]) -> Iterator[Overridden]:
    """What groups of the entry ask of modules that another group matches more closely."""
    for row in rows:
        for scheme in modifier.outranked(row.name, planning.linears.modules[row.name]):
            yield Overridden(row.name, scheme.described, planning.entry.key, planning.entry.key)


def _schemes(planning: Planning, modifier: Quantizer[Any]) -> tuple[dict[str, Scheme], dict[str, PlanError]]:
    """The scheme of each module, and modules that no group takes."""
    found = {name: modifier.scheme_of(name, planning.linears.modules[name]) for name in planning.names}
    known = {name: scheme for name, scheme in found.items() if scheme is not None}
    return known, {
        name: UnfitError(f"no group of config_groups takes {name}", "add it to one's `targets`, or to `ignore`")
        for name in found
        if name not in known
    }


def _plan_plain(
    planning: Planning, modifier: Quantizer[Any], schemes: Mapping[str, Scheme], name: str
) -> QuantizedPlan:
    layer, scheme = planning.stacks.block_of(name), schemes[name]
    if layer is None:
        raise UnfitError(
            f"{name} is not inside a decoder layer, where calibration inputs are taken", f"add {name!r} to `ignore`"
        )
    if planning.uses.get(name):
        raise UnfitError(
            f"{name} has its weight in common with {', '.join(planning.uses[name])}, and a quantised weight is stored for one",
            f"add {name!r} to `ignore`",
        )
    observes, outputs = modifier.observes(scheme), scheme.args.output_activations
    listens = outputs is not None and outputs.dynamic is not True
    if (observes or listens) and planning.entry.config.calibration is None:
        raise PlanError(
            f"{name}: its scheme ({scheme.described}) has scales that come from calibration inputs, and the recipe has none: "
            "add a top-level `calibration`, say `calibration: {dataset: builtin:pydoc, samples: 64, sequence_length: 256}`, "
            "or take a scheme with dynamic activations (and for weights no observer that weighs columns)"
        )
    if scheme.args.weights.strategy == "tensor_group" and planning.entry.config.calibration is None:
        raise PlanError(
            f"{name}: its global scale is that of all modules that read the same tensor, which a window of data tells: add a "
            "top-level `calibration`"
        )
    installed = release_of("compressed-tensors")
    if scheme.args.weights.strategy == "block" and tuple(map(int, installed.split(".")[:2])) < (0, 19):
        raise PlanError(
            f"{name}: compressed-tensors {installed} does not read weights with a scale for a block ({scheme.described}): install "
            "0.19 or later, or take another scheme"
        )
    linear = planning.linears.modules[name]
    shape = ModuleShape(name, linear.out_features, linear.in_features, planning.itemsize)
    row = QuantizedPlan.of(planning, modifier, shape, layer, modifier.plan(shape, scheme))
    assert isinstance(row, QuantizedPlan)
    return replace(row, scheme=scheme.text, observes=observes, listens=listens)


def _read_together(rows: Sequence[QuantizedPlan], context: BlockContext) -> dict[str, list[Tensor]]:
    """For each module the weights of those of its scheme that read the same tensor: servers run them as one layer."""
    groups: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        groups.setdefault((context.reader(row.name), row.scheme), []).append(row.name)
    stored = context.storage.dtype
    weights = {row.name: context.weights.read(f"{row.name}.weight").to(stored) for row in rows}
    return {name: [weights[other] for other in names] for names in groups.values() for name in names}


def _check_finite(row: QuantizedPlan, weight: Tensor, loaded: Tensor) -> None:
    """Raise NumericalError where a range was too wide for its scale."""
    bad = int((~loaded.isfinite()).sum())
    if bad:
        least, most = float(weight.min()), float(weight.max())
        raise NumericalError(
            f"{bad} of the {loaded.numel()} weights of {row.name} are not finite as {row.quantized.described}: they reach from "
            f"{least:g} to {most:g}; take a symmetric scheme, or add {row.name!r} to `ignore`"
        )


def _quantize(
    share: Share,
    row: QuantizedPlan,
    seen: tuple[Statistic | None, Statistic | None],
    together: Sequence[Tensor],
    context: BlockContext,
) -> tuple[ModuleResult, QuantizedLinear, Tensor]:
    """Quantise one module by what was `seen` of its inputs and outputs: what was measured, what is stored, and the weight that a
    loader makes of it.
    """
    statistic, outputs = seen
    weight = context.weights.read(f"{row.name}.weight")
    modifier: Any = share.modifier
    started = time.perf_counter()
    with located(share.entry, row.name):
        outcome = modifier.quantize(
            row.shape, weight.to(context.storage.dtype), statistic, row.quantized, together, outputs
        )
        loaded = outcome.packed.dequantize(weight.dtype)
        _check_finite(row, weight, loaded)
    error = relative_error(weight, loaded)
    result = ModuleResult(
        name=row.name,
        modifier=share.entry.key,
        losses=(error**2,),
        stored_loss=error**2,
        error=error,
        tokens=0 if statistic is None else statistic.tokens,
        iterations=0,
        stop_reason="closed form",
        counts=outcome.counts,
        seconds=time.perf_counter() - started,
    )
    return result, outcome.packed, loaded
