"""Carry out a plan: one pass over the decoder layers a stage, every modifier on statistics of its own inputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.calibration.tokens import TokenSet
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import ArmorError, PlanError
from armor_recipes.modifiers import FactorModifier, Modifier, ModuleShape, Rearranger, Refiner, Statistic
from armor_recipes.modifiers.base import AnyModifier, KnowsOrigins, WithGradients
from armor_recipes.recipe import ModifierEntry, Recipe
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.session.capture import Stream, capture_stream, input_groups, inputs_of
from armor_recipes.session.events import (
    ChannelsReordered,
    LayerStarted,
    ModuleFinished,
    Observer,
    PhaseStarted,
    SolveProgressed,
    UnitRefined,
    ignore_events,
    one_at_a_time,
)
from armor_recipes.session.gradients import output_gradients
from armor_recipes.session.hooks import Hooks, feeding
from armor_recipes.session.layers import find_decoder_layers
from armor_recipes.session.plan import ModulePlan, Plan, is_matched, scope_of, streams_of
from armor_recipes.session.rearranging import RearrangeJob, RearrangeResult, rearrange_layer
from armor_recipes.session.refining import Refined, RefineJob, RefineResult, Teaching, refine_layer, refine_model
from armor_recipes.session.solving import FactorTask, ModuleResult, Solved, Solver, SolveTask, loaded_weight

#: One stream of activations for each distinct calibration set and model that it runs through: `compressed` or `dense`.
_StreamKey = tuple[CalibrationSpec, str]
_Collected = dict[str, dict[str, Statistic]]


class Session:
    """Runs a plan on a model in memory, in place. A context manager: leaving it removes every hook.

    Args:
        model: a causal language model in its compute dtype; the planned modules' weights are replaced by Ŵ.
        tokens: calibration windows for each modifier's calibration spec.
        stored_dtype: the dtype of the checkpoint. Applied weights are what a loader makes of the stored tensors, bit for bit.
        keep_packed: keep factors for a packed checkpoint; else they are folded into plain weights.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        model: nn.Module,
        modifiers: Mapping[str, AnyModifier[Any]],
        tokens: Mapping[CalibrationSpec, TokenSet],
        *,
        stored_dtype: torch.dtype,
        keep_packed: bool = True,
        observer: Observer = ignore_events,
    ) -> None:
        self.recipe = recipe
        self.plan = plan
        self.model = model
        self.modifiers = modifiers
        self.tokens = tokens
        self.stored_dtype = stored_dtype
        self.keep_packed = keep_packed
        self.observer = one_at_a_time(observer)
        self.hooks = Hooks()
        self.layers = find_decoder_layers(model)
        self.results: dict[str, ModuleResult] = {}
        self.refinements: list[RefineResult] = []
        self.rearrangements: list[RearrangeResult] = []
        self._solver = Solver(model, self.observer, stored_dtype=stored_dtype, keep_packed=keep_packed)
        self._factors: dict[str, PackedLinear] = {}
        self._keeps_factors = any(isinstance(modifier, (Refiner, FactorModifier)) for modifier in modifiers.values())
        self._sharing: dict[str, str] = {}
        self._dense: dict[str, Tensor] | None = None
        self._readers: dict[str, str] = {}
        self._gradients: dict[str, Tensor] = {}
        self._work_done = 0.0
        self._work = plan.flops or 1.0

    def __enter__(self) -> Session:
        self.hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hooks.__exit__(kind, error, trace)

    def run(self) -> dict[str, ModuleResult]:
        """Run all stages; returns results by module name, in the order in which they were made."""
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                for stage in self.recipe.stages:
                    self._run_stage(stage)
        finally:
            self.model.train(training)
        return self.results

    def _run_stage(self, stage: str) -> None:
        entries = [e for e in self.recipe.modifiers if e.stage == stage and self.plan.takes(e.key)]
        self.observer(PhaseStarted(f"stage {stage}"))
        self._gradients = self._output_gradients(entries)
        streams = self._capture(entries)
        of_model = [e for e in entries if scope_of(self.modifiers[e.key]) == "model"]
        self._dense = {} if of_model else None
        last = self.plan.last_layer(stage)
        for layer in range(last + 1):
            self.observer(LayerStarted(stage, layer, len(self.layers.names)))
            self._run_layer(layer, [e for e in entries if e not in of_model], streams, last=last)
        del streams  # no longer needed
        for entry in of_model:
            self.observer(PhaseStarted(f"{entry.name} ({stage})"))
            self._refine_model(entry)
        self._dense = None

    def _output_gradients(self, entries: Sequence[ModifierEntry]) -> dict[str, Tensor]:
        """Each module's g, of those whose modifiers ask for it: on their calibration, from the model as the stage finds it."""
        wanted: dict[tuple[CalibrationSpec, int], dict[str, ModifierEntry]] = {}
        for entry in entries:
            modifier, spec = self.modifiers[entry.key], entry.config.calibration
            if isinstance(modifier, Modifier) and modifier.needs_gradients and spec is not None:
                names = [m.name for m in self.plan.modules if m.modifier == entry.key]
                wanted.setdefault((spec, entry.config.seed), {}).update(dict.fromkeys(names, entry))
        found: dict[str, Tensor] = {}
        for (spec, seed), takers in wanted.items():
            self.observer(PhaseStarted("gradients of the outputs"))
            gradients = output_gradients(self.model, self.layers, list(takers), self._batches(spec), seed=seed)
            for name, entry in takers.items():
                weight = self.model.get_parameter(f"{name}.weight")
                try:
                    found[name] = gradients.mean_square(name, len(weight)).to(weight.device)
                except ArmorError as error:
                    raise type(error)(f"{entry.where}: {entry.name}: {error}") from error
        return found

    def _batches(self, spec: CalibrationSpec) -> list[Tensor]:
        """Token ids `(B, L)` on the model's device."""
        device = next(self.model.parameters()).device
        return [ids.to(device) for ids in self.tokens[spec].ids.split(spec.batch_size)]

    def _key(self, entry: ModifierEntry, kind: str) -> _StreamKey:
        assert entry.config.calibration is not None
        return entry.config.calibration, kind

    def _streams_of(self, entry: ModifierEntry) -> tuple[str, ...]:
        return streams_of(entry, self.modifiers[entry.key])

    def _capture(self, entries: list[ModifierEntry]) -> dict[_StreamKey, Stream]:
        keys = dict.fromkeys(self._key(entry, kind) for entry in entries for kind in self._streams_of(entry))
        streams = {
            key: capture_stream(
                self.model, self.layers, self.tokens[key[0]].ids, batch_size=key[0].batch_size, hooks=self.hooks
            )
            for key in keys
        }
        names = list(dict.fromkeys(m.name for m in self.plan.modules))  # a module has a row for each modifier
        if keys and not self._readers:
            window = self.tokens[next(iter(keys))[0]].ids[:1]
            self._readers = input_groups(self.model, self.layers, names, window, self.hooks)
        return streams

    def _run_layer(
        self, layer: int, entries: list[ModifierEntry], streams: dict[_StreamKey, Stream], *, last: int
    ) -> None:
        """Channels are reordered first, which leaves the layer's function; then dense streams pass it before anything else
        changes; then each modifier observes, solves and applies in turn.
        """
        entries = self._rearrange(layer, entries, streams)
        collected: _Collected = {}
        before = _Before.of(self.layers.modules[layer], streams, keep=any(map(is_matched, entries)))
        for key, stream in streams.items():
            if key[1] == "dense":
                readers = [e for e in entries if self._streams_of(e) == ("dense",) and self._key(e, "dense") == key]
                wanted = layer < last or any(scope_of(self.modifiers[e.key]) == "layer" for e in entries)
                collected |= self._observe(layer, stream, readers, advance=wanted)
        for entry, *others in self._at_once(layer, entries):
            if scope_of(self.modifiers[entry.key]) == "layer":
                self._refine_layer(entry, layer, streams)
                continue
            if is_matched(entry):
                self._solve_matched(layer, [entry, *others], streams, before)
                continue
            planned = self.plan.for_layer(entry.stage, layer, entry.key)
            if planned and self._streams_of(entry) == ("compressed",):
                collected |= self._observe(layer, streams[self._key(entry, "compressed")], [entry], advance=False)
            if isinstance(self.modifiers[entry.key], FactorModifier):
                self._change_factors(entry, planned, collected.get(entry.key, {}))
            else:
                jobs = [(e, self.plan.for_layer(e.stage, layer, e.key)) for e in (entry, *others)]
                self._solve(jobs, collected)
        for key, stream in streams.items():
            if key[1] == "compressed" and layer < last:
                stream.advance(layer)

    def _at_once(self, layer: int, entries: Sequence[ModifierEntry]) -> list[list[ModifierEntry]]:
        """The entries in order, those together that follow one another on other modules and in whose order nothing lies.

        Nothing does where inputs come from the dense model, nor where the modules are matched, which has an order of its own.
        """
        groups: list[list[ModifierEntry]] = []
        taken: set[str] = set()  # the last group's modules
        last: tuple[str, ...] | None = None  # what its entries read; None where it takes no other entry
        for entry in entries:
            names = {module.name for module in self.plan.for_layer(entry.stage, layer, entry.key)}
            reads = self._streams_of(entry) if isinstance(self.modifiers[entry.key], Modifier) else None
            if reads != last or reads in (None, ("compressed",)) or not taken.isdisjoint(names):
                groups.append([entry])
                taken, last = names, reads
            else:
                groups[-1].append(entry)
                taken |= names
        return groups

    def _rearrange(
        self, layer: int, entries: list[ModifierEntry], streams: dict[_StreamKey, Stream]
    ) -> list[ModifierEntry]:
        """Run the rearrangers among the entries; returns the others."""
        others = []
        for entry in entries:
            modifier = self.modifiers[entry.key]
            if not isinstance(modifier, Rearranger):
                others.append(entry)
                continue
            planned = self.plan.chains(entry.key, layer)
            if planned:
                stream = streams[self._key(entry, *self._streams_of(entry))]
                job = RearrangeJob(entry, modifier, [row.chain for row in planned], stream, self._gradients)
                found = rearrange_layer(job, self.model, self.layers, layer, self.hooks)
                for result, row in zip(found, planned, strict=True):
                    self._take_order(result, row.flops)
        return others

    def _take_order(self, result: RearrangeResult, flops: float) -> None:
        self.rearrangements.append(result)
        kept = result.kept_before, result.kept_after
        self.observer(ChannelsReordered(result.consumer, *kept, result.seconds, self._progress(flops)))

    def _observe(self, layer: int, stream: Stream, entries: list[ModifierEntry], *, advance: bool) -> _Collected:
        """Run the layer once with a hook on every module that one of the modifiers takes; statistics by modifier and module."""
        with self.hooks:
            collected = {entry.key: self._statistics(layer, entry) for entry in entries}
            if advance:
                stream.advance(layer)
            elif entries:
                stream.observe(layer)
        return collected

    def _statistics(self, layer: int, entry: ModifierEntry) -> dict[str, Statistic]:
        """A statistic for each module, one for all that read the same input, with the hook that feeds it."""
        found: dict[str, Statistic] = {}
        statistics: dict[str, Statistic] = {}
        for module in self.plan.for_layer(entry.stage, layer, entry.key):
            reader = self._readers.get(module.name, module.name)
            if reader not in found:
                found[reader] = self._new_statistic(entry, module)
                self.hooks.before(self.model.get_submodule(module.name), feeding(found[reader]))
            statistics[module.name] = found[reader]
        return statistics

    def _new_statistic(self, entry: ModifierEntry, module: ModulePlan) -> Statistic:
        modifier, spec = self.modifiers[entry.key], entry.config.calibration
        assert isinstance(modifier, (Modifier, FactorModifier))
        assert spec is not None
        statistic: Statistic = modifier.statistic(self._shape(module))
        if isinstance(statistic, KnowsOrigins):
            statistic.expect(self.tokens[spec].origins)
        return statistic

    def _solve_matched(
        self, layer: int, entries: Sequence[ModifierEntry], streams: dict[_StreamKey, Stream], before: _Before
    ) -> None:
        """Solve modules that read the same tensor together, in the order in which the layer calls them.

        Each sees what those before it have become. Matched on what they were, it would make up for errors a second time.
        """
        order = {name: place for place, name in enumerate(self._readers)}
        planned = [(e, module) for e in entries for module in self.plan.for_layer(e.stage, layer, e.key)]
        groups: dict[str, dict[str, tuple[ModifierEntry, list[ModulePlan]]]] = {}
        for entry, module in sorted(planned, key=lambda pair: order[pair[1].name]):
            group = groups.setdefault(self._readers[module.name], {})
            group.setdefault(entry.key, (entry, []))[1].append(module)
        for group in groups.values():
            collected: _Collected = {}
            for entry, modules in group.values():
                statistic = self._observe_pairs(layer, streams, entry, modules[0], before)
                collected[entry.key] = {module.name: statistic for module in modules}
            self._solve(list(group.values()), collected)

    def _observe_pairs(
        self,
        layer: int,
        streams: dict[_StreamKey, Stream],
        entry: ModifierEntry,
        planned: ModulePlan,
        before: _Before,
    ) -> Statistic:
        """What a module reads on the compressed stream, with what the dense layer's reads on the same tokens beside it."""
        name, statistic = planned.name, self._new_statistic(entry, planned)
        take_pair: Any = statistic.update
        dense, compressed = (streams[self._key(entry, kind)] for kind in ("dense", "compressed"))
        module = self.model.get_submodule(name)
        twin = before.layer.get_submodule(name.removeprefix(self.layers.names[layer] + "."))
        once = False
        for batch, hidden in enumerate(before.hidden[self._key(entry, "dense")]):
            call = replace(dense.call(layer, batch), hidden=hidden)
            wanted = inputs_of(twin, call, before.layer, self.hooks, once=once)
            found = inputs_of(module, compressed.call(layer, batch), self.layers.modules[layer], self.hooks, once=once)
            if [x.shape for x in found] != [x.shape for x in wanted]:
                raise PlanError(
                    f"{entry.where}: {entry.name}: {name}: other tokens reach it than reach the dense model's module, so there "
                    f"is nothing to match; choose another `propagate` for it, or add {name!r} to `ignore`"
                )
            for x, target in zip(found, wanted, strict=True):
                take_pair(x, target)
            once = len(found) == 1
        return statistic

    def _solve(self, jobs: Sequence[tuple[ModifierEntry, Sequence[ModulePlan]]], collected: _Collected) -> None:
        """Solve the entries' modules, each rounded to the stored dtype, and put them in place once all are solved."""
        tasks: list[SolveTask] = []
        flops: dict[str, float] = {}
        for entry, planned in jobs:
            flops |= {module.name: module.flops for module in planned}
            tasks += self._tasks(entry, planned, collected.get(entry.key, {}))
        solved = [one for found in self._solver.solve(tasks) for one in self._announced(found, flops)]
        for one in solved:
            self._apply(one)

    def _tasks(
        self, entry: ModifierEntry, planned: Sequence[ModulePlan], statistics: Mapping[str, Statistic]
    ) -> list[SolveTask]:
        """One for each module, or for all that share their B."""
        modifier = self.modifiers[entry.key]
        assert isinstance(modifier, Modifier)
        shares = getattr(entry.config, "share_input_factor", False)
        groups: dict[Any, list[ModulePlan]] = {}
        for module in planned:
            reader = self._readers.get(module.name, module.name)
            groups.setdefault((reader, module.block_size) if shares else module.name, []).append(module)
        self._sharing |= {module.name: group[0].name for group in groups.values() for module in group}
        return [
            SolveTask(
                entry, modifier, tuple(map(self._shape, group)), self._with_gradients(modifier, group, statistics)
            )
            for group in groups.values()
        ]

    def _with_gradients(
        self, modifier: Modifier[Any], group: Sequence[ModulePlan], statistics: Mapping[str, Statistic]
    ) -> Statistic | None:
        """The group's input statistic, with the gradients at its outputs where the modifier asks for them."""
        found = statistics.get(group[0].name)
        if not modifier.needs_gradients:
            return found
        return WithGradients(found, torch.cat([self._gradients[module.name] for module in group]))

    def _change_factors(
        self, entry: ModifierEntry, planned: Sequence[ModulePlan], statistics: Mapping[str, Statistic]
    ) -> None:
        """Change the modules' factors, those that share a B as one, and put them in place once all are changed."""
        modifier = self.modifiers[entry.key]
        assert isinstance(modifier, FactorModifier)
        groups: dict[str, list[ModulePlan]] = {}
        for module in planned:
            groups.setdefault(self._sharing[module.name], []).append(module)
        tasks = [
            FactorTask(
                entry,
                modifier,
                tuple(map(self._shape, group)),
                tuple(self._factors[module.name] for module in group),
                statistics.get(group[0].name),
                self._no_longer_shared(owner, group),
            )
            for owner, group in groups.items()
        ]
        flops = {module.name: module.flops for module in planned}
        for one in [changed for found in self._solver.change(tasks) for changed in found]:
            self._put(f"{one.name}.weight", one.weight)
            result = self.results[one.name]
            self.results[one.name] = replace(result, packed=one.factors, changes=(*result.changes, one.change))
            self._factors[one.name] = one.factors
            share, change = self._progress(flops[one.name]), one.change
            self.observer(ModuleFinished(one.name, change.losses[0], change.stored_loss, change.seconds, share))

    def _no_longer_shared(self, owner: str, group: Sequence[ModulePlan]) -> dict[str, int]:
        """A count where only some of the modules that share a B are changed: B is then stored for them, too."""
        sharers = [name for name, first in self._sharing.items() if first == owner]
        return {} if len(sharers) == len(group) else {"input_factors_no_longer_shared": 1}

    def _announced(self, solved: list[Solved], flops: Mapping[str, float]) -> list[Solved]:
        for one in solved:
            result = one.result
            share = self._progress(flops[result.name])
            self.observer(ModuleFinished(result.name, result.losses[0], result.stored_loss, result.seconds, share))
        return solved

    def _apply(self, solved: Solved) -> None:
        name = solved.result.name
        self._put(f"{name}.weight", solved.weight)
        self.results[name] = solved.result
        self._factors.pop(name, None)
        if solved.factors is not None and self._keeps_factors:
            self._factors[name] = solved.factors

    def _put(self, parameter: str, value: Tensor) -> None:
        """Every change of a parameter. What the dense model held is kept where a refiner of this stage asks for it."""
        own = self.model.get_parameter(parameter).data
        if self._dense is not None and parameter not in self._dense:
            narrow = own.to(self.stored_dtype, copy=True)
            self._dense[parameter] = narrow if torch.equal(narrow.to(own.dtype), own) else own.clone()
        own.copy_(value)

    def _progress(self, flops: float) -> float:
        self._work_done += flops
        return min(1.0, self._work_done / self._work)

    def _refiner(self, key: str) -> Refiner[Any]:
        found = self.modifiers[key]
        assert isinstance(found, Refiner)
        return found

    def _job(self, entry: ModifierEntry, unit: str, names: Sequence[str]) -> RefineJob:
        refiner = self._refiner(entry.key)

        def progress(done: int, at_most: int, loss: float) -> None:
            self.observer(SolveProgressed(unit, done, at_most, loss))

        packed = {name: self._factors[name] for name in names}
        return RefineJob(entry, refiner, packed, self._sharing, self._solver.factor_dtype, progress)

    def _refine_layer(self, entry: ModifierEntry, layer: int, streams: dict[_StreamKey, Stream]) -> None:
        for unit in self.plan.refinements_of(entry.key, layer):
            inputs, targets = (streams[self._key(entry, kind)] for kind in ("compressed", "dense"))
            job = self._job(entry, unit.unit, unit.modules)
            self._take(refine_layer(job, self.layers, layer, inputs=inputs, targets=targets.hidden), unit.flops)

    def _refine_model(self, entry: ModifierEntry) -> None:
        spec = entry.config.calibration
        assert spec is not None
        assert self._dense is not None
        batches = self._batches(spec)
        for unit in self.plan.refinements_of(entry.key, None):
            job = self._job(entry, unit.unit, unit.modules)
            self._take(refine_model(job, self.model, self.layers, Teaching(batches, self._dense)), unit.flops)

    def _take(self, refined: Refined, flops: float) -> None:
        """Put what was trained in place, rounded to the stored dtype."""
        compute = next(self.model.parameters()).dtype
        for name, packed in refined.factors.items():
            folded = packed.fold(torch.float32).to(self.stored_dtype).to(compute)
            self._put(f"{name}.weight", loaded_weight(packed, compute) if self.keep_packed else folded)
            result = self.results[name]
            self.results[name] = replace(
                result,
                packed=packed if self.keep_packed else None,
                refined=(*result.refined, refined.result.modifier),
            )
            self._factors[name] = packed
        for name, vector in refined.vectors.items():
            self._put(name, vector.to(self.stored_dtype).to(compute))
        self.refinements.append(refined.result)
        found, share = refined.result, self._progress(flops)
        self.observer(UnitRefined(found.unit, found.losses[0], min(found.losses), found.steps, found.seconds, share))

    def _shape(self, module: ModulePlan) -> ModuleShape:
        return ModuleShape(module.name, module.d_out, module.d_in, self.stored_dtype.itemsize)


@dataclass(frozen=True, slots=True)
class _Before:
    """A layer before any of its modifiers ran, and what each dense stream brought to it; empty where nobody asks."""

    layer: nn.Module
    hidden: Mapping[_StreamKey, list[Tensor]]

    @classmethod
    def of(cls, layer: nn.Module, streams: Mapping[_StreamKey, Stream], *, keep: bool) -> _Before:
        dense = {key: list(stream.hidden) for key, stream in streams.items() if key[1] == "dense"}
        return cls(copy.deepcopy(layer), dense) if keep else cls(layer, {})
