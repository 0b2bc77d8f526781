"""What is seen while a run goes on: one live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from armor_recipes.events import (
    ChannelsReordered,
    EvaluationProgressed,
    Event,
    LayerStarted,
    ModuleFinished,
    PhaseStarted,
    SolveProgressed,
    UnitRefined,
    WorkEstimated,
    ignore_events,
)

#: Seconds without a line after which a plain view tells how far what is going on has come.
_QUIET = 60.0


class View(Protocol):
    """Takes events of a run."""

    def __call__(self, event: Event) -> None:
        """Show one event."""


@contextmanager
def progress_view(console: Console, *, quiet: bool, phases: bool = True) -> Iterator[View]:
    """A live view on a terminal, plain lines elsewhere (without `phases` only where it takes long), nothing when quiet."""
    if quiet:
        yield ignore_events
    elif console.is_terminal:
        with _progress(console) as progress:
            yield LiveView(progress)
    else:
        yield PlainView(console, phases=phases)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description:<16}", markup=False),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False),
        console=console,
        expand=True,
    )


class LiveView:
    """Two bars: the whole run (by estimated work, evaluation included, with the time left), and what is going on now."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.work = WorkDone()
        self.whole = progress.add_task("all", total=1.0, note="")
        self.now = progress.add_task("", total=None, note="")
        self.layer = ""

    def __call__(self, event: Event) -> None:
        """Show one event."""
        update = self.progress.update
        match event:
            case PhaseStarted(name):
                self.layer = name
                update(self.now, description=name, total=None, completed=0, note="")
            case LayerStarted(_, index, total):
                self.layer = f"layer {index + 1}/{total}"
                update(self.now, description=self.layer, total=None, note="calibrating")
            case SolveProgressed(module, done, at_most, loss):
                update(
                    self.now, description=self.layer, total=at_most, completed=done, note=f"{module}  loss {loss:.5f}"
                )
            case EvaluationProgressed(done, total, measure):
                update(self.now, total=total, completed=done, note=measure)
        if self.work(event):
            update(self.whole, completed=self.work.share, note=self.work.left())


class PlainView:
    """One line a phase, one a layer with its losses and the time left, and one where nothing was told for a minute."""

    def __init__(self, console: Console, *, phases: bool = True) -> None:
        self.console = console
        self.phases = phases
        self.told = time.monotonic()
        self.work = WorkDone()
        self.losses: list[tuple[float, float]] = []
        self.layer = ""

    def __call__(self, event: Event) -> None:
        """Print what is worth a line."""
        if isinstance(event, PhaseStarted | LayerStarted):
            self._finish_layer()  # with what was left as it ended
        self.work(event)
        match event:
            case PhaseStarted(name) if self.phases:
                self._line(name)
            case LayerStarted(_, index, total):
                self.layer = f"  layer {index + 1}/{total}"
            case ModuleFinished(_, first, last, _, _):
                self.losses.append((first, last))
            case UnitRefined(unit, first, last, steps):
                self._finish_layer()
                self._line(f"  {unit}: held-out loss {first:.5f} -> {last:.5f} in {steps} steps, {self.work.left()}")
            case SolveProgressed(module, done, at_most, loss):
                self._after_a_minute(f"  {module}: {done} of {at_most}, loss {loss:.5f}")
            case EvaluationProgressed(done, total, measure):
                self._after_a_minute(f"  {measure}: {done} of {total}")

    def _finish_layer(self) -> None:
        if self.losses:
            first, last = (sum(values) / len(values) for values in zip(*self.losses, strict=True))
            note = f"{len(self.losses)} modules, mean loss {first:.5f} -> {last:.5f}"
            self._line(f"{self.layer}: {note}, {self.work.left()}")
        self.losses = []

    def _after_a_minute(self, text: str) -> None:
        if time.monotonic() - self.told >= _QUIET:
            self._line(", ".join(filter(None, (text, self.work.left()))))

    def _line(self, text: str) -> None:
        self.told = time.monotonic()
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class WorkDone:
    """How much of a run is done, by what its parts are thought to take; without an estimate, by the share of solving alone."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {"compress": 1.0}
        self.ends = 0.0
        self.measures: Mapping[str, int] = {}
        self.done: dict[str, float] = {}
        self.phase = ""
        self.begin: tuple[float, float] | None = None
        """The clock and the share when the first work of the run's phases began."""

    def __call__(self, event: Event) -> bool:
        """Take an event; tells whether more is done now."""
        before = self.share
        match event:
            case WorkEstimated(phases, ends, measures):
                self.phases, self.ends, self.measures = dict(phases), ends, measures
            case PhaseStarted(name):
                self._start(name)
            case LayerStarted():
                self._begin()
            case EvaluationProgressed(done, total, measure):
                self._evaluated(measure, done / max(total, 1))
            case (
                SolveProgressed(share=float(share))
                | ModuleFinished(share=share)
                | UnitRefined(share=share)
                | ChannelsReordered(share=share)
            ):
                self.done["compress"] = share
        return self.share != before

    def _start(self, phase: str) -> None:
        """All phases before this one are done. Reading and hashing come before the first, writing and comparing after the last."""
        self.phase, names = phase, list(self.phases)
        if phase in names:
            self.done.update(dict.fromkeys(names[: names.index(phase)], 1.0), reading=1 / 3)
            self._begin()
        elif phase in ("save", "verify"):
            self.done.update(dict.fromkeys(names, 1.0), reading=1 / 3 if phase == "save" else 2 / 3)

    def _begin(self) -> None:
        if self.begin is None:
            self.begin = time.monotonic(), self.share

    def _evaluated(self, measure: str, part: float) -> None:
        """One measure after the other, in their order."""
        names, whole = list(self.measures), sum(self.measures.values())
        if measure == self.phase and measure in self.phases:  # not of the evaluation, but all of its phase
            self.done[measure] = part
        if self.phase in self.phases and measure in names and whole:
            before = sum(self.measures[name] for name in names[: names.index(measure)])
            self.done[self.phase] = (before + part * self.measures[measure]) / whole

    @property
    def share(self) -> float:
        """Of the whole run, 0 to 1."""
        done = sum(self.done.get(name, 0.0) * seconds for name, seconds in self.phases.items())
        whole = sum(self.phases.values()) + self.ends
        return (done + self.done.get("reading", 0.0) * self.ends) / whole if whole else 0.0

    def left(self) -> str:
        """The time that is left, in words."""
        share = self.share
        if self.begin is None or share <= self.begin[1]:
            return ""
        seconds = (time.monotonic() - self.begin[0]) * (1 - share) / (share - self.begin[1])
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} left"
