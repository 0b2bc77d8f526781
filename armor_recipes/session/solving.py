"""Solve the modules that a modifier takes in one layer: each by itself, several at once where cores are free."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import ArmorError
from armor_recipes.modifiers import FactorModifier, Modifier, ModuleShape, Outcome, Statistic
from armor_recipes.modifiers.base import WithGradients, join_shapes
from armor_recipes.modifiers.threads import one_thread_each
from armor_recipes.recipe import ModifierEntry
from armor_recipes.session.events import Observer, SolveProgressed
from armor_recipes.solver import relative_error
from armor_recipes.solver.result import SparseFactors


@dataclass(frozen=True, slots=True)
class FactorChange:
    """What a factor modifier did to one module.

    `losses` are against the product A · S · B before, relative to 0 in its place; `stored_loss` is that of what is stored.
    Modules that share a B are changed as one and have the same losses and counts.
    """

    modifier: str
    core: str
    losses: tuple[float, ...]
    stored_loss: float
    tokens: int
    iterations: int
    stop_reason: str
    counts: Mapping[str, int]
    seconds: float


@dataclass(frozen=True, slots=True)
class ModuleResult:
    """What was done to one module.

    `losses` are relative to Ŵ = 0; `stored_loss` is the last one computed again after rounding to the stored dtype;
    `error` is ‖W − Ŵ‖ / ‖W‖ (Frobenius) of the stored weight; `packed` is what the checkpoint keeps, None for a dense weight.
    `refined` names the refiners that trained the factors afterwards, and `changes` are what factor modifiers did to them then:
    losses and error are those from before.
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
    measures: Mapping[str, float] = field(default_factory=dict)
    refined: tuple[str, ...] = ()
    changes: tuple[FactorChange, ...] = ()


@dataclass(frozen=True, slots=True)
class SolveTask:
    """Modules that are solved as one: a single one, or several that read the same input and share its factor."""

    entry: ModifierEntry
    modifier: Modifier[Any]
    shapes: tuple[ModuleShape, ...]
    statistic: Statistic | None


@dataclass(frozen=True, slots=True)
class Solved:
    """A module's result, the weight in compute dtype `(O, I)` that takes its place, and its factors if it has any."""

    result: ModuleResult
    weight: Tensor
    factors: PackedLinear | None


@dataclass(frozen=True, slots=True)
class FactorTask:
    """Modules whose factors are changed as one: a single one, or several with the same B, of which `packed` has one each."""

    entry: ModifierEntry
    modifier: FactorModifier[Any]
    shapes: tuple[ModuleShape, ...]
    packed: tuple[PackedLinear, ...]
    statistic: Statistic | None
    counts: Mapping[str, int]
    """What the session has to say of these modules."""


@dataclass(frozen=True, slots=True)
class Changed:
    """A module's new factors, and the weight in compute dtype `(O, I)` that a loader makes of them."""

    name: str
    change: FactorChange
    weight: Tensor
    factors: PackedLinear


T = TypeVar("T")


class Solver:
    """Solves tasks against a model's weights without changing them. `stored_dtype` and `keep_packed` are the session's."""

    def __init__(self, model: nn.Module, observer: Observer, *, stored_dtype: torch.dtype, keep_packed: bool) -> None:
        self.keep_packed = keep_packed
        self.model = model
        self.observer = observer
        self.stored_dtype = stored_dtype
        # Factors that are to be folded into dense weights are rounded once, as products, and not before.
        self.factor_dtype = stored_dtype if keep_packed else torch.float32
        self._stopped = threading.Event()

    def solve(self, tasks: Sequence[SolveTask]) -> Iterator[list[Solved]]:
        """Results in the order of the tasks, several tasks at once (`_run`)."""
        return self._run([partial(self._solve, task) for task in tasks])

    def change(self, tasks: Sequence[FactorTask]) -> Iterator[list[Changed]]:
        """New factors in the order of the tasks, several tasks at once (`_run`)."""
        return self._run([partial(self._change, task) for task in tasks])

    def _run(self, jobs: Sequence[Callable[[], T]]) -> Iterator[T]:
        """What the jobs give, in order; as many at once as torch has threads, each on one thread.

        On a CPU a solve is made of small products that gain little from a second thread; bits are the same either way.
        """
        device = next(self.model.parameters()).device.type
        workers = min(torch.get_num_threads(), len(jobs)) if device == "cpu" else 1
        self._stopped.clear()
        if workers <= 1:
            yield from (job() for job in jobs)
            return
        yield from self._run_at_once(jobs, workers)

    def _run_at_once(self, jobs: Sequence[Callable[[], T]], workers: int) -> Iterator[T]:
        """Results in order up to the first job that fails, in whatever order they do; then the error of the first in order."""
        futures: list[Future[T]] = []
        with one_thread_each(workers) as pool:
            try:
                futures.extend(pool.submit(self._or_stop, job) for job in jobs)
                for future in futures:
                    wait([future])
                    if self._stopped.is_set():
                        break
                    yield future.result()
            finally:
                self._stopped.set()
                for future in futures:
                    future.cancel()
        _raise_first(futures)

    def _or_stop(self, job: Callable[[], T]) -> T:
        """Do a job, and let the others end if it fails: those under way at their next report, those to come before they begin."""
        if self._stopped.is_set():
            raise _StoppedError
        try:
            return job()
        except BaseException:
            self._stopped.set()
            raise

    def _progress(self, name: str) -> Callable[[int, int, float], None]:
        def progress(done: int, at_most: int, loss: float) -> None:
            if self._stopped.is_set():
                raise _StoppedError
            self.observer(SolveProgressed(name, done, at_most, loss))

        return progress

    @torch.no_grad()
    def _solve(self, task: SolveTask) -> list[Solved]:
        """Solve one task and round the result to the stored dtype. Errors name the recipe's line and the modules."""
        weights = [self._weight(shape) for shape in task.shapes]
        shape = join_shapes(task.shapes)
        started = time.perf_counter()
        try:
            stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
            outcome = task.modifier.solve(shape, stacked, task.statistic, self._progress(shape.name))
            rows = [s.d_out for s in task.shapes]
            seconds = (time.perf_counter() - started) / len(weights)
            given = task.statistic
            statistics = given.split(rows) if isinstance(given, WithGradients) else [given] * len(rows)
            parts = zip(task.shapes, weights, statistics, outcome.split(rows), strict=True)
            return [self._stored(task, *part, seconds) for part in parts]
        except ArmorError as error:
            if shape.name in str(error):
                raise
            raise type(error)(f"{task.entry.where}: {task.entry.name}: {shape.name}: {error}") from error

    @torch.no_grad()
    def _change(self, task: FactorTask) -> list[Changed]:
        """Change the factors of one task and pack them. Errors name the recipe's line and the modules."""
        shape = join_shapes(task.shapes)
        started = time.perf_counter()
        try:
            before = SparseFactors.stack([packed.factors() for packed in task.packed])
            outcome = task.modifier.change(shape, before, task.statistic, self._progress(shape.name))
            parts = outcome.factors.split([s.d_out for s in task.shapes])
            packed = [PackedLinear.from_factors(part, self.factor_dtype) for part in parts]
        except ArmorError as error:
            raise type(error)(f"{task.entry.where}: {task.entry.name}: {shape.name}: {error}") from error
        stored = torch.cat([one.fold(torch.float32) for one in packed])
        change = FactorChange(
            modifier=task.entry.key,
            core=packed[0].core,
            losses=outcome.losses,
            stored_loss=task.modifier.loss(before.dense(), task.statistic, stored),
            tokens=0 if task.statistic is None else task.statistic.tokens,
            iterations=outcome.iterations,
            stop_reason=outcome.stop_reason,
            counts={**outcome.counts, **task.counts},
            seconds=(time.perf_counter() - started) / len(packed),
        )
        return [
            Changed(s.name, change, loaded_weight(one, self._weight(s).dtype), one)
            for s, one in zip(task.shapes, packed, strict=True)
        ]

    def _weight(self, shape: ModuleShape) -> Tensor:
        weight = self.model.get_submodule(shape.name).weight
        assert isinstance(weight, Tensor)
        return weight.detach()

    def _stored(
        self,
        task: SolveTask,
        shape: ModuleShape,
        weight: Tensor,
        statistic: Statistic | None,
        outcome: Outcome,
        seconds: float,
    ) -> Solved:
        """What the checkpoint will hold, and the weight in compute dtype that a loader makes of it."""
        found = outcome.factorization
        factors = None if found is None else PackedLinear.from_factorization(found, self.factor_dtype)
        if factors is not None and self.keep_packed:
            stored = loaded_weight(factors, weight.dtype)
        else:
            stored = outcome.weight.to(self.stored_dtype).to(weight.dtype)
        result = ModuleResult(
            name=shape.name,
            modifier=task.entry.key,
            losses=outcome.losses,
            stored_loss=task.modifier.loss(weight, statistic, stored),
            error=relative_error(weight, stored),
            tokens=0 if statistic is None else statistic.tokens,
            iterations=outcome.iterations,
            stop_reason=outcome.stop_reason,
            counts=outcome.counts if bool(weight.any()) else {**outcome.counts, "zero_weight": 1},
            seconds=seconds,
            measures=outcome.measures,
            packed=factors if self.keep_packed else None,
        )
        return Solved(result, stored, factors)


class _StoppedError(Exception):
    """Ends the other solves of a layer once one of them failed or the run was interrupted."""


def _raise_first(futures: Sequence[Future[Any]]) -> None:
    """Raise the error of the first job in order that has one of its own. All are over; those that never began are cancelled."""
    for future in futures:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, _StoppedError):
            raise error


def loaded_weight(packed: PackedLinear, dtype: torch.dtype) -> Tensor:
    """The weight that a loader computing in `dtype` makes of the stored tensors, bit for bit."""
    return packed.to(dtype).fold(dtype)
