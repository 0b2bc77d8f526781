"""A run's figures, as JSON lines or into a tracker of experiments, which is imported only where it is asked for."""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, Protocol

from armor_recipes.errors import RecipeError
from armor_recipes.events import (
    ChannelsReordered,
    EvaluationFinished,
    Event,
    ModuleFinished,
    PhaseStarted,
    SolveProgressed,
    UnitRefined,
)
from armor_recipes.paths import user_path
from armor_recipes.report.measure import peak_memory_bytes

#: Phases in which a run may still be refused: until they are over nothing is logged.
_REFUSING = ("preflight", "tokenize")


class Sink(Protocol):
    """Where figures go."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Take figures by name: of one module or unit at that step of its own, or of the run at a count of its modules."""

    def close(self) -> None:
        """Write what is still held; nothing is logged afterwards."""


class JsonLines:
    """A line for each call: `{"time": seconds since 1970, "step": 3, "loss/model.layers.0.q_proj": 0.0412}`.

    Lines are added to what the file holds: a run that was cut short and is gone on with has one file. Not finite numbers are null.
    A file that is not there is made at once, so that one that cannot be is told, and removed where no line was written.
    """

    def __init__(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self.unused = None if file.exists() else file
        self.stream = file.open("a", encoding="utf-8", buffering=1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write a line."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.unused = None
        self.stream.write(json.dumps({"time": round(time.time(), 3), "step": step, **finite}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self.stream.close()
        if self.unused is not None:
            self.unused.unlink(missing_ok=True)


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: str) -> None:
        _imported("tensorboard", "tensorboard")
        self.writer: Any = importlib.import_module("torch.utils.tensorboard").SummaryWriter(folder or "runs")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Write scalars."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush the files."""
        self.writer.close()


class MLflow:
    """A run of an experiment, at MLFLOW_TRACKING_URI."""

    def __init__(self, experiment: str) -> None:
        self.mlflow = _imported("mlflow", "mlflow")
        self.mlflow.set_experiment(experiment or "armor-recipes")
        self.mlflow.start_run()

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send figures."""
        self.mlflow.log_metrics(dict(values), step=step)

    def close(self) -> None:
        """End the run."""
        self.mlflow.end_run()


class _Counted:
    """wandb, and trackio, which is called alike. Their steps are of the whole run and never fall: they count for themselves."""

    name: str

    def __init__(self, project: str) -> None:
        self.module = _imported(self.name, self.name)
        self.module.init(project=project or "armor-recipes")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Send figures, the step of the module with them."""
        self.module.log({**values, "module_step": step})  # trackio keeps `step` for its own

    def close(self) -> None:
        """End the run."""
        self.module.finish()  # and not the run's own, after which trackio ends it once more as the process does


class Wandb(_Counted):
    """A run of a project of Weights & Biases."""

    name = "wandb"


class Trackio(_Counted):
    """A run of a project of Trackio, on this machine."""

    name = "trackio"


_TRACKERS: Mapping[str, Callable[[str], Sink]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
    "mlflow": MLflow,
}


def _imported(module: str, extra: str) -> Any:
    """A tracker's package. Raises RecipeError, naming the extra, where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise RecipeError(
            f"--metrics {extra}: {module} cannot be imported ({error}): pip install 'armor-recipes[{extra}]'"
        ) from error


def _no_results() -> AbstractContextManager[Any]:
    """What trackers print goes to standard error: standard output is for results."""
    return redirect_stdout(sys.stderr)


def check_files(asked: Sequence[str], output: str) -> None:
    """Raise RecipeError for a file that lies in the output folder, whose place the run takes, and for one that is named twice."""
    seen: dict[Path, str] = {}
    for name in asked:
        if name.partition(":")[0] in _TRACKERS or not name.endswith(".jsonl"):
            continue
        file = user_path(name).resolve()
        if file.is_relative_to(user_path(output).resolve()):
            raise RecipeError(
                f"--metrics {name} lies in the output folder {output}, which the run makes: name a file elsewhere"
            )
        if file in seen:
            raise RecipeError(f"--metrics {seen[file]} and {name} are one file: leave one of them out")
        seen[file] = name


def open_sink(asked: str) -> Sink:
    """`FILE.jsonl`, `tensorboard:FOLDER`, `trackio:PROJECT`, `wandb:PROJECT` or `mlflow:EXPERIMENT`, or one of these names alone.

    Raises RecipeError where it is none of these, its package is missing, or it cannot be begun.
    """
    name, _, rest = asked.partition(":")
    try:
        if name in _TRACKERS:
            with _no_results():
                return _TRACKERS[name](rest)
        if asked.endswith(".jsonl"):
            return JsonLines(user_path(asked))
    except RecipeError:
        raise
    except Exception as error:  # trackers share no class of errors
        raise RecipeError(f"--metrics {asked} cannot be begun ({type(error).__name__}: {error})") from error
    raise RecipeError(
        f"--metrics {asked}: give a file that ends in .jsonl, or {', '.join(_TRACKERS)} with a name behind a colon"
    )


class Metrics:
    """An observer that logs to sinks. One that fails is left out from there on, and `failed` says so: a run is worth more."""

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self.sinks = dict(sinks)
        self.failed: list[str] = []
        self.modules = 0
        self.begin = self.mark = time.perf_counter()
        self.phase = ""
        self.held: dict[str, float] = {}
        self.told = False

    def __call__(self, event: Event) -> None:
        """Log what an event tells."""
        values, step = self._values(event)
        if values:
            self.told = True
            self._all(lambda sink: sink.log(values, step))

    def _values(self, event: Event) -> tuple[dict[str, float], int]:
        match event:
            case SolveProgressed(module, done, _, loss):
                return {f"loss/{module}": loss}, done
            case ModuleFinished(module, first, last, seconds, share):
                losses = {f"first_loss/{module}": first, f"last_loss/{module}": last, f"seconds/{module}": seconds}
                return losses | self._finished(share), self.modules
            case UnitRefined(unit, first, last, steps, seconds, share):
                losses = {f"first_loss/{unit}": first, f"last_loss/{unit}": last, f"steps/{unit}": float(steps)}
                return {**losses, f"seconds/{unit}": seconds} | self._finished(share), self.modules
            case ChannelsReordered(module, before, after, seconds, share):
                kept = {f"kept_before/{module}": before, f"kept_after/{module}": after, f"seconds/{module}": seconds}
                return kept | self._finished(share), self.modules
            case EvaluationFinished(measure, compressed, values):
                when = "after" if compressed else "before"
                return {f"evaluation/{measure}/{name}/{when}": value for name, value in values.items()}, self.modules
            case PhaseStarted(name):
                return self._phase(name), self.modules
        return {}, 0

    def _finished(self, share: float) -> dict[str, float]:
        self.modules += 1
        return {"share": share, "peak_memory_bytes": float(peak_memory_bytes())}

    def _phase(self, name: str) -> dict[str, float]:
        """What the phase that ends took, in seconds and memory, with those before it that were held."""
        now, ended = time.perf_counter(), self.phase
        seconds, self.mark, self.phase = now - self.mark, now, name
        if ended:
            self.held[f"phase_seconds/{ended}"] = seconds
        if name in _REFUSING or not self.held:
            return {}
        held, self.held = self.held, {}
        return {**held, "peak_memory_bytes": float(peak_memory_bytes())}

    def close(self) -> None:
        """Log the last phase and the whole time, and close the sinks. Of a run that was refused nothing is logged."""
        if self.told:
            values = {**self._phase(""), "run_seconds": time.perf_counter() - self.begin}
            self._all(lambda sink: sink.log(values, self.modules))
        self._all(lambda sink: sink.close())

    def _all(self, do: Callable[[Sink], None]) -> None:
        for name, sink in list(self.sinks.items()):
            try:
                with _no_results():
                    do(sink)
            except Exception as error:  # trackers share no class of errors
                del self.sinks[name]
                self.failed.append(
                    f"--metrics {name} failed and was left out from there on ({type(error).__name__}: {error})"
                )


@contextmanager
def metrics_to(asked: Sequence[str]) -> Iterator[Metrics]:
    """Open sinks, and close them however the run ends. Raises RecipeError before anything is logged."""
    opened: dict[str, Sink] = {}
    try:
        for name in dict.fromkeys(asked):
            opened[name] = open_sink(name)
        found = Metrics(opened)
    except BaseException:
        for sink in opened.values():
            sink.close()
        raise
    try:
        yield found
    finally:
        found.close()
