"""Carry out a plan: one pass over the decoder layers a stage, every modifier on statistics of its own inputs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.calibration.tokens import TokenSet
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import ArmorError, NumericalError
from armor_recipes.modifiers import Modifier, ModuleShape, Outcome, Statistic
from armor_recipes.recipe import ModifierEntry, Recipe
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.session.capture import Stream, capture_stream
from armor_recipes.session.events import (
    LayerStarted,
    ModuleFinished,
    Observer,
    PhaseStarted,
    SolveProgressed,
    ignore_events,
)
from armor_recipes.session.hooks import Hooks
from armor_recipes.session.layers import find_decoder_layers
from armor_recipes.session.plan import ModulePlan, Plan
from armor_recipes.solver import relative_error

#: One stream of activations for each distinct calibration set and way of propagating errors.
_StreamKey = tuple[CalibrationSpec, str]


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """What was done to one module.

    `losses` are relative to Ŵ = 0; `stored_loss` is the last one computed again after rounding to the stored dtype;
    `error` is ‖W − Ŵ‖ / ‖W‖ (Frobenius) of the stored weight; `packed` is what the checkpoint keeps, None for a dense weight.
    """

    name: str
    modifier: str
    losses: tuple[float, ...]
    stored_loss: float
    error: float
    tokens: int
    iterations: int
    stop_reason: str
    counts: Mapping[str, int]
    seconds: float
    packed: PackedLinear | None


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
        modifiers: Mapping[str, Modifier[Any]],
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
        self.observer = observer
        self.hooks = Hooks()
        self.layers = find_decoder_layers(model)
        self.results: dict[str, ModuleResult] = {}
        self._work_done = 0.0
        self._work = sum(m.flops for m in plan.modules) or 1.0

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
        entries = [e for e in self.recipe.modifiers if e.stage == stage and self._planned(e)]
        self.observer(PhaseStarted(f"stage {stage}"))
        streams = self._capture(entries)
        last = max((m.layer for m in self.plan.modules if m.stage == stage), default=-1)
        for layer in range(last + 1):
            self.observer(LayerStarted(stage, layer, len(self.layers.names)))
            self._run_layer(layer, entries, streams, advance=layer < last)

    def _planned(self, entry: ModifierEntry) -> bool:
        return any(m.modifier == entry.key for m in self.plan.modules)

    def _capture(self, entries: list[ModifierEntry]) -> dict[_StreamKey, Stream]:
        keys = dict.fromkeys(key for entry in entries if (key := _stream_key(entry)) is not None)
        return {
            key: capture_stream(
                self.model, self.layers, self.tokens[key[0]].ids, batch_size=key[0].batch_size, hooks=self.hooks
            )
            for key in keys
        }

    def _run_layer(
        self, layer: int, entries: list[ModifierEntry], streams: dict[_StreamKey, Stream], *, advance: bool
    ) -> None:
        """Dense streams pass the layer before anything changes; then each modifier observes, solves and applies in turn."""
        collected: dict[str, dict[str, Statistic]] = {}
        for key, stream in streams.items():
            if key[1] == "dense":
                collected |= self._observe(
                    layer, stream, [e for e in entries if _stream_key(e) == key], advance=advance
                )
        for entry in entries:
            planned = self.plan.for_layer(entry.stage, layer, entry.key)
            found = _stream_key(entry)
            if entry.key not in collected and found is not None and planned:
                collected |= self._observe(layer, streams[found], [entry], advance=False)
            for module in planned:
                self._solve(entry, module, collected.get(entry.key, {}).get(module.name))
        for key, stream in streams.items():
            if key[1] != "dense" and advance:
                stream.advance(layer)

    def _observe(
        self, layer: int, stream: Stream, entries: list[ModifierEntry], *, advance: bool
    ) -> dict[str, dict[str, Statistic]]:
        """Run the layer once with a hook on every module that one of the modifiers takes; statistics by modifier and module."""
        collected: dict[str, dict[str, Statistic]] = {}
        with self.hooks:
            for entry in entries:
                collected[entry.key] = {}
                for module in self.plan.for_layer(entry.stage, layer, entry.key):
                    statistic = self.modifiers[entry.key].statistic(self._shape(module))
                    collected[entry.key][module.name] = statistic
                    self.hooks.before(self.model.get_submodule(module.name), _feeding(statistic))
            if advance:
                stream.advance(layer)
            else:
                stream.observe(layer)
        return collected

    def _solve(self, entry: ModifierEntry, module: ModulePlan, statistic: Statistic | None) -> None:
        """Solve one module, round the result to the stored dtype and put it in place."""
        modifier, linear = self.modifiers[entry.key], self.model.get_submodule(module.name)
        weight = linear.weight
        assert isinstance(weight, Tensor)
        started = time.perf_counter()

        def progress(done: int, at_most: int, loss: float) -> None:
            self.observer(SolveProgressed(module.name, done, at_most, loss))

        try:
            _refuse_zero(weight)
            outcome = modifier.solve(self._shape(module), weight.detach(), statistic, progress)
            packed, stored = self._stored(outcome)
            stored_loss = modifier.loss(weight.detach(), statistic, stored)
        except ArmorError as error:
            if module.name in str(error):
                raise
            raise type(error)(f"{entry.where}: {entry.name}: {module.name}: {error}") from error
        result = ModuleResult(
            name=module.name,
            modifier=entry.key,
            losses=outcome.losses,
            stored_loss=stored_loss,
            error=relative_error(weight.detach(), stored),
            tokens=0 if statistic is None else statistic.tokens,
            iterations=len(outcome.losses) - 1,
            stop_reason=outcome.stop_reason,
            counts=outcome.counts,
            seconds=time.perf_counter() - started,
            packed=packed,
        )
        weight.data.copy_(stored)
        self.results[module.name] = result
        self._work_done += module.flops
        share = min(1.0, self._work_done / self._work)
        self.observer(ModuleFinished(module.name, result.losses[0], stored_loss, result.seconds, share))

    def _stored(self, outcome: Outcome) -> tuple[PackedLinear | None, Tensor]:
        """What the checkpoint will hold, and the weight in compute dtype that a loader makes of it."""
        compute = next(self.model.parameters()).dtype
        if outcome.factorization is None or not self.keep_packed:
            return None, outcome.weight.to(self.stored_dtype).to(compute)
        packed = PackedLinear.from_factorization(outcome.factorization, self.stored_dtype)
        factors = packed.values.to(compute), packed.bitmask, packed.a.to(compute), packed.b.to(compute)
        return packed, PackedLinear(*factors).fold(compute)

    def _shape(self, module: ModulePlan) -> ModuleShape:
        return ModuleShape(module.name, module.d_out, module.d_in, self.stored_dtype.itemsize)


def _refuse_zero(weight: Tensor) -> None:
    """All measures are relative to the weight, so there must be one."""
    if not bool(weight.any()):
        raise NumericalError("every number of its weight is zero: there is nothing to prune; add it to `ignore`")


def _stream_key(entry: ModifierEntry) -> _StreamKey | None:
    spec = entry.config.calibration
    return None if spec is None else (spec, getattr(entry.config, "propagate", "compressed"))


def _feeding(statistic: Statistic) -> Any:
    """A forward pre-hook that gives a module's input to the statistic."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        statistic.update(args[0] if args else kwargs["input"])

    return hook
