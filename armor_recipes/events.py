"""What a running job tells whoever watches it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """A named phase of the run begins: `load`, `evaluate before`, `stage prune_stage`, `save`, `verify` and so on."""

    name: str


@dataclass(frozen=True, slots=True)
class WorkEstimated:
    """What the run is thought to take, in CPU seconds: `phases` maps a phase's name to them, `ends` are reading and writing.

    `measures` maps the name of each measure to the tokens that it evaluates, before and after.
    """

    phases: Mapping[str, float]
    ends: float
    measures: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class LayerStarted:
    """Work on decoder layer `index` of `total` begins."""

    stage: str
    index: int
    total: int


@dataclass(frozen=True, slots=True)
class SolveProgressed:
    """A module's solve went on, or a unit's training: iterations done and at most, best loss so far.

    `share` is how much of the session's estimated work is now done, 0 to 1; None of a solve, beside which others may run.
    """

    module: str
    done: int
    at_most: int
    loss: float
    share: float | None = None


@dataclass(frozen=True, slots=True)
class ModuleFinished:
    """A module was solved and applied; `share` is how much of the session's estimated work is now done, 0 to 1."""

    module: str
    first_loss: float
    last_loss: float
    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class UnitRefined:
    """A refiner trained a decoder layer or the model and its factors are in place; losses are the held-out ones."""

    unit: str
    first_loss: float
    last_loss: float
    steps: int
    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class ChannelsReordered:
    """A module's input channels were reordered; shares of the score that its masks keep, in the old and the new order."""

    module: str
    kept_before: float
    kept_after: float
    seconds: float
    share: float


@dataclass(frozen=True, slots=True)
class EvaluationProgressed:
    """Windows or samples that a measure has evaluated so far."""

    done: int
    total: int
    measure: str = ""


@dataclass(frozen=True, slots=True)
class EvaluationFinished:
    """A measure was taken, of the dense model or of the `compressed` one; its figures by name."""

    measure: str
    compressed: bool
    values: Mapping[str, float]


Event = (
    PhaseStarted
    | WorkEstimated
    | LayerStarted
    | SolveProgressed
    | ModuleFinished
    | UnitRefined
    | ChannelsReordered
    | EvaluationProgressed
    | EvaluationFinished
)
Observer = Callable[[Event], None]


def one_at_a_time(observer: Observer) -> Observer:
    """The observer, called by one thread at a time: modules are solved at once, and each tells of itself."""
    lock = threading.Lock()

    def observe(event: Event) -> None:
        with lock:
            observer(event)

    return observe


def ignore_events(event: Event) -> None:
    """The observer of a run that nobody watches."""


def both(first: Observer, second: Observer) -> Observer:
    """An observer that passes each event to two."""

    def observe(event: Event) -> None:
        first(event)
        second(event)

    return observe
