"""What is seen while a run goes on: one live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
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
    ignore_events,
)


class View(Protocol):
    """Takes events of a run."""

    def __call__(self, event: Event) -> None:
        """Show one event."""


@contextmanager
def progress_view(console: Console, *, quiet: bool) -> Iterator[View]:
    """A live view on a terminal, plain lines elsewhere, nothing when quiet."""
    if quiet:
        yield ignore_events
    elif console.is_terminal:
        with _progress(console) as progress:
            yield LiveView(progress)
    else:
        yield PlainView(console)


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
    """Two bars: the whole run (by estimated solving work, with the time left), and what is going on now."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.clock = TimeLeft()
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
                self.clock.start()
                self.layer = f"layer {index + 1}/{total}"
                update(self.now, description=self.layer, total=None, note="calibrating")
            case SolveProgressed(module, done, at_most, loss):
                update(
                    self.now, description=self.layer, total=at_most, completed=done, note=f"{module}  loss {loss:.5f}"
                )
            case ModuleFinished(share=share) | UnitRefined(share=share) | ChannelsReordered(share=share):
                update(self.whole, completed=share, note=self.clock.left(share))
            case EvaluationProgressed(done, total, measure):
                update(self.now, total=total, completed=done, note=measure)


class PlainView:
    """One line a phase, and one a layer with its losses and the time left."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.clock = TimeLeft()
        self.losses: list[tuple[float, float]] = []
        self.share = 0.0
        self.layer = ""

    def __call__(self, event: Event) -> None:
        """Print what is worth a line."""
        match event:
            case PhaseStarted(name):
                self._finish_layer()
                self._line(name)
            case LayerStarted(_, index, total):
                self.clock.start()
                self._finish_layer()
                self.layer = f"  layer {index + 1}/{total}"
            case ModuleFinished(_, first, last, _, share):
                self.losses.append((first, last))
                self.share = share
            case UnitRefined(unit, first, last, steps, _, share):
                self._finish_layer()
                self._line(
                    f"  {unit}: held-out loss {first:.5f} -> {last:.5f} in {steps} steps, {self.clock.left(share)}"
                )

    def _finish_layer(self) -> None:
        if self.losses:
            first, last = (sum(values) / len(values) for values in zip(*self.losses, strict=True))
            note = f"{len(self.losses)} modules, mean loss {first:.5f} -> {last:.5f}"
            self._line(f"{self.layer}: {note}, {self.clock.left(self.share)}")
        self.losses = []

    def _line(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)


class TimeLeft:
    """Estimates the solving time that is left from the share of work done."""

    def __init__(self) -> None:
        self.begin: float | None = None

    def start(self) -> None:
        """The first solve begins; later calls change nothing."""
        if self.begin is None:
            self.begin = time.monotonic()

    def left(self, share: float) -> str:
        """In words, for a share of 0 to 1."""
        if self.begin is None or share <= 0:
            return ""
        seconds = (time.monotonic() - self.begin) * (1 - share) / share
        return f"{int(seconds // 60)}:{int(seconds % 60):02d} left"
