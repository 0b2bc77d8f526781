"""What a plan will take on this machine: estimates, for `--plan` and the report, never for a decision."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from armor_recipes.compute.threads import at_once, one_thread
from armor_recipes.model.facts import model_facts
from armor_recipes.modifiers import AnyModifier
from armor_recipes.modifiers.base import KnowsItsSize, Settles
from armor_recipes.modifiers.kinds.contract import calibration_tokens
from armor_recipes.modifiers.kinds.module import ModulePlan
from armor_recipes.modifiers.kinds.refiner import RefinePlan
from armor_recipes.plan.memory import peak_bytes, vocabulary, weight_bytes
from armor_recipes.plan.plan import Plan
from armor_recipes.plan.sets import CalibrationSets
from armor_recipes.recipe import Recipe

#: What a pass of the blocks costs to each number that a linear module reads or gives, beside the products: norms, activations,
#: attention; and beside those of a training. This and what follows was measured on the embedded model, in numbers through a softmax
#: (`_Speeds.value`) and in calls of torch on next to nothing (`_Speeds.call`), which are measured where the estimate is made.
_AROUND, _AROUND_TRAINING = 4.0, 15.0
#: Calls for each linear module in a pass, and in a part of a training; in a solve for each step, and to begin and end it.
_PASS_CALLS, _TRAINING_CALLS, _STEP_CALLS, _SOLVE_CALLS = 25, 100, 300, 320
#: Numbers for each weight of a module: in a step of its solve beside the products, and to begin and end the solve.
_STEP_VALUES, _SOLVE_VALUES = 33.0, 127.0
#: CPU seconds that a run takes to begin and end, and of those for each byte of the model: text read and tokenised, weights read,
#: hashed, written, read again and compared. For each byte that is changed: rounded, folded and put in its place. Both were measured
#: on a model of 13 GB with `model.memory`, beside other work.
_ENDS, _ENDS_BYTE, _CHANGED_BYTE = 1.0, 1.7e-8, 1.2e-8
#: Backward passes go through the products of A, S and B again: forward, B x once more, to x, and to A and B.
_FACTOR_PRODUCTS = 4
#: Calls that are timed together.
_CALLED = 100
#: Tokens of a pass where no entry has a calibration, and of one of evaluation.
_TOKENS = 512
#: Times that each logit is looked at by a loss, that of a distillation among them: two softmaxes, their exponentials, the gradient.
_LOOKS = 4
#: How many numbers through a softmax comparing one logit with the dense model's costs, in float64, and keeping the dense one in a
#: file meanwhile, whether it is finite with it. Measured over 262,144 tokens.
_COMPARED, _KEPT = 60.0, 25.0
#: Logits that a measurement takes at most: more than caches hold, as those of a pass are.
_LOGITS = 1 << 24


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """What a run takes on this machine, evaluation included.

    Attributes:
        peak_bytes: of memory that no file stands behind.
        seconds: on so many `threads`.
        cpu_seconds: of all threads.
        cpu_seconds_by: CPU seconds by what takes them.
        cpu_seconds_by_entry: of those the ones that an entry's rows take, by its key, with passes, statistics and commits.
        probed: whether it rests on a measurement of the model's own modules, and not of products alone.
        uncounted: sentences about what is not in it.
    """

    peak_bytes: int
    seconds: float
    cpu_seconds: float = 0.0
    cpu_seconds_by: Mapping[str, float] = field(default_factory=dict)
    cpu_seconds_by_entry: Mapping[str, float] = field(default_factory=dict)
    threads: int = 1
    probed: bool = False
    uncounted: tuple[str, ...] = ()

    def without(self, part: str) -> RunEstimate:
        """Of a run that is spared one part of `cpu_seconds_by`."""
        parts = {name: seconds for name, seconds in self.cpu_seconds_by.items() if name != part}
        cpu = sum(parts.values())
        times: dict[str, Any] = {"seconds": round(cpu / self.threads, 1), "cpu_seconds": round(cpu, 1)}
        return replace(self, cpu_seconds_by=parts, **times)


@dataclass(frozen=True, slots=True)
class Rates:
    """CPU seconds on this machine, of one thread.

    Attributes:
        token: one token through all blocks, forward.
        logits: one token's logits from hidden states, with their loss.
        solve: an operation of a solve, by `kind_of` its row; `""` for all others.
        statistic: one token in all statistics of an entry, by its key.
        trained: one token in all units and epochs of a refiner, by its key.
        beside: bytes that the most of any work was measured to take beside the model.
        probed: whether the model's own modules were measured.
        likeness: keeping one token's logits of the dense model, and comparing others with them.
    """

    token: float
    logits: float
    solve: Mapping[object, float]
    statistic: Mapping[str, float]
    trained: Mapping[str, float]
    beside: int = 0
    probed: bool = False
    likeness: float = 0.0


def estimate_run(
    plan: Plan,
    recipe: Recipe,
    model: nn.Module,
    modifiers: Mapping[str, AnyModifier[Any]],
    *,
    rates: Rates | None = None,
    evaluated: int | None = None,
    itemsize: int = 4,
) -> RunEstimate:
    """Add up the plan's work at the given rates, or at those of products that are measured here and now.

    `model` may be on the meta device. `evaluated` are the tokens of the recipe's measures where they are known; else those that the
    recipe names. `itemsize` are the bytes of a value that is computed with, see `peak_bytes`.
    """
    found, sets = rates or product_rates(plan, model, modifiers), CalibrationSets.of(recipe, modifiers, plan.rows)
    measured, uncounted = _evaluated(recipe) if evaluated is None else (evaluated, ())
    solving, training = _solving(plan, found), _training(plan, sets, found)
    statistics = {key: sets.tokens_of(key) * each for key, each in found.statistic.items()}
    work = {
        "passes": _passes(sets, found),
        "statistics": sum(statistics.values()),
        "solving": sum(solving.values()),
        "committing": _CHANGED_BYTE * sum(4 * d_out * d_in for d_out, d_in in plan.shapes.values()),
        "training": sum(training.values()),
        "evaluation": 2 * measured * (found.token + found.logits) + _compared(recipe) * found.likeness,
    }
    around = sum(work[name] for name in ("passes", "statistics", "committing")) / (work["solving"] or 1.0)
    work["measuring"] = _measuring(plan, modifiers, sets, found)
    work["ends"] = _ENDS + _ENDS_BYTE * weight_bytes(model)
    cpu, threads = sum(work.values()), at_once()
    return RunEstimate(
        peak_bytes=peak_bytes(plan, recipe, model, modifiers, beside=found.beside, itemsize=itemsize),
        seconds=round(cpu / threads, 1),
        cpu_seconds=round(cpu, 1),
        cpu_seconds_by=work,
        cpu_seconds_by_entry={key: each * (1 + around) for key, each in solving.items()} | training,
        threads=threads,
        probed=found.probed,
        uncounted=uncounted,
    )


def _passes(sets: CalibrationSets, rates: Rates) -> float:
    """CPU seconds of calibration's passes: a dense stream is observed as it passes, a compressed one before."""
    passed = sum(calibration_tokens(spec) * (1 if kind == "dense" else 2) for spec, kind in sets.held)
    gradients = sum(map(calibration_tokens, sets.back))  # forward and back
    return passed * rates.token + gradients * (2 * rates.token + rates.logits)


def _solving(plan: Plan, rates: Rates) -> dict[str, float]:
    """CPU seconds of all rows but trainings, by entry."""
    found: dict[str, float] = {}
    for row in plan.rows:
        if isinstance(row, RefinePlan):
            continue
        kind = kind_of(row) if isinstance(row, ModulePlan) else ""
        found[row.modifier] = found.get(row.modifier, 0.0) + row.flops * rates.solve.get(kind, rates.solve[""])
    return found


def _training(plan: Plan, sets: CalibrationSets, rates: Rates) -> dict[str, float]:
    """CPU seconds of refiners, by entry."""
    keys = dict.fromkeys(row.modifier for row in plan.refinements)
    return {key: sets.tokens_of(key) * rates.trained[key] for key in keys if key in rates.trained}


def _measuring(plan: Plan, modifiers: Mapping[str, AnyModifier[Any]], sets: CalibrationSets, rates: Rates) -> float:
    """Of what is not settled: a trial of each module; each window once for statistics, then forward and back beside the changes'
    products, and before that once more where trials are weighed by gradients.
    """
    seconds = 0.0
    for key, spec in sets.by_entry.items():
        modifier = modifiers[key]
        asked = modifier.unsettled if isinstance(modifier, Settles) else None
        if asked is None:
            continue
        rows = [row for row in plan.modules if row.modifier == key]
        seconds += asked.share * sum(row.flops * rates.solve.get(kind_of(row), rates.solve[""]) for row in rows)
        tokens, rounds = min(calibration_tokens(spec), asked.windows * spec.sequence_length), 1 + asked.gradients
        seconds += tokens * ((2 + 2 * rounds) * rates.token + (1 + 2 * rounds) * rates.logits)
    return seconds


def _evaluated(recipe: Recipe) -> tuple[int, tuple[str, ...]]:
    """Tokens of one round of the measures, as the recipe names them, and what it does not name."""
    tokens, unknown = 0, []
    for name, spec in ({} if recipe.evaluation is None else recipe.evaluation.measures).items():
        found = _tokens_of(spec)
        if found is None:
            unknown.append(name)
        else:
            tokens += found
    text = "the evaluation of {} is not counted: how long the data are shows once they are read"
    return tokens, (text.format(" and ".join(unknown)),) if unknown else ()


def _compared(recipe: Recipe) -> int:
    """Tokens whose logits are compared with the dense model's."""
    spec = None if recipe.evaluation is None else recipe.evaluation.fidelity
    return (_tokens_of(spec) or 0) if spec is not None else 0


def _tokens_of(spec: object) -> int | None:
    """Of one round of a measure; None where its section does not say."""
    count = getattr(spec, "windows", None) or getattr(spec, "samples", None)
    return count * int(getattr(spec, "sequence_length", 0)) if isinstance(count, int) else None


def product_rates(plan: Plan, model: nn.Module, modifiers: Mapping[str, AnyModifier[Any]]) -> Rates:
    """Rates by counted operations, at the speed of products that are measured here and now."""
    head = vocabulary(model)
    speeds = _Speeds.measured(head)
    inside = [m for m in model.modules() if isinstance(m, nn.Linear)]
    hidden = model_facts(model).hidden_size or 0
    parameters = sum(m.weight.numel() for m in inside) - (
        head * hidden if any(m.out_features == head for m in inside) else 0
    )
    around = sum(m.in_features + m.out_features for m in inside if m.out_features != head)
    token = 2.0 * parameters / speeds.product + _AROUND * around / speeds.value
    token += _PASS_CALLS * len(inside) * speeds.call / _pass_tokens(modifiers)
    logits = 2.0 * head * hidden / speeds.product + _LOOKS * head / speeds.logit
    trained: dict[str, float] = {}
    for row in plan.rows:
        if not isinstance(row, RefinePlan):
            continue
        refiner: Any = modifiers[row.modifier]
        half = row.layer is None and refiner.compute_dtype(torch.empty(0)) == torch.bfloat16
        stored = [plan.stored[name] for name in row.modules if name in plan.stored]
        factors = sum(m.d_out * m.block_size[0] + m.d_in * m.block_size[1] for m in stored if m.block_size is not None)
        values = _AROUND_TRAINING * sum(m.d_out + m.d_in for m in stored)
        looks = _LOOKS * head / row.logit_stride / speeds.logit if row.layer is None else 0.0
        each = row.flops / row.tokens / (speeds.bfloat16() if half else speeds.product)
        each += refiner.epochs * (2.0 * _FACTOR_PRODUCTS * factors / speeds.solve + values / speeds.value + looks)
        each += refiner.epochs * _TRAINING_CALLS * len(stored) * speeds.call / _pass_tokens({row.modifier: refiner})
        trained[row.modifier] = trained.get(row.modifier, 0.0) + each
    statistic = {}
    for key, rows in by_entry(plan).items():
        if not modifiers[key].needs.streams_for(rows):
            continue
        grams = sum(d_in**2 for d_in in _read(rows) if _is_gram(modifiers[key], rows, d_in))
        statistic[key] = 2.0 * grams / speeds.product + sum(_read(rows)) / speeds.value
    solve: dict[object, float] = {"": 1 / speeds.solve}
    for row in plan.modules:
        if row.flops and kind_of(row) not in solve:
            solve[kind_of(row)] = 1 / speeds.solve + speeds.around(row, modifiers[row.modifier].steps) / row.flops
    return Rates(token, logits, solve, statistic, trained, likeness=(_COMPARED + _KEPT) * head / speeds.value)


def _pass_tokens(modifiers: Mapping[str, AnyModifier[Any]]) -> int:
    """Tokens of a batch of the first calibration set."""
    specs = (modifier.config.calibration for modifier in modifiers.values())
    return next((spec.batch_size * spec.sequence_length for spec in specs if spec is not None), _TOKENS)


def statistic_seconds(modifier: AnyModifier[Any], rows: Sequence[ModulePlan], d_in: int, seconds: float) -> float:
    """Of one token in all statistics of an entry, given those in one of inputs so wide."""
    power = 2 if _is_gram(modifier, rows, d_in) else 1
    return sum(seconds * (other / d_in) ** power for other in _read(rows))


def kind_of(row: ModulePlan) -> tuple[str, int, int]:
    """What modules of one entry have in common whose solves take as long an operation: their shape."""
    return row.modifier, row.d_out, row.d_in


def by_entry(plan: Plan) -> dict[str, list[ModulePlan]]:
    """The rows of modules by the entry's key."""
    found: dict[str, list[ModulePlan]] = {}
    for row in plan.modules:
        found.setdefault(row.modifier, []).append(row)
    return found


def _read(rows: Sequence[ModulePlan]) -> list[int]:
    """Widths of what the modules read: those of one parent and width one tensor, but of three and more the last its own."""
    groups = Counter((row.layer, row.name.rpartition(".")[0], row.d_in) for row in rows)
    return [d_in for (_, _, d_in), count in groups.items() for _ in range(2 if count > 2 else 1)]


def _is_gram(modifier: AnyModifier[Any], rows: Sequence[ModulePlan], d_in: int) -> bool:
    """Whether its statistic of inputs so wide holds products of channels."""
    made: Any = modifier
    shape = next(row.shape for row in rows if row.d_in == d_in)
    statistic = made.statistic(shape) if made.config.needs_calibration and made.needs.streams else None
    return isinstance(statistic, KnowsItsSize) and statistic.full_bytes >= 8 * d_in**2


@dataclass(frozen=True, slots=True)
class _Speeds:
    """Of one thread, in operations a second of CPU time; `value` and `logit` in numbers through a softmax, of few and of as many as
    a pass has logits; `call` in seconds of a call.
    """

    solve: float
    product: float
    value: float
    call: float
    logit: float

    @classmethod
    def measured(cls, vocabulary: int) -> _Speeds:
        """Blocks as solves multiply them, a product as passes have it, and rows of logits."""
        left, right = (torch.ones(16, rows, 64, dtype=torch.float32, device="cpu") for rows in (512, 64))
        rows, one = torch.ones(64, 8192, dtype=torch.float32, device="cpu"), torch.ones(1, device="cpu")
        logits = torch.ones(max(1, min(_TOKENS, _LOGITS // max(1, vocabulary))), max(1, vocabulary), device="cpu")
        return cls(
            solve=_rate(lambda: torch.bmm(left, right), 2.0 * 16 * 512 * 64 * 64),
            product=_product_speed(torch.float32),
            value=_rate(lambda: rows.log_softmax(-1), float(rows.numel())),
            logit=_rate(lambda: logits.log_softmax(-1), float(logits.numel())),
            call=1 / _rate(lambda: [one.add(1.0) for _ in range(_CALLED)], float(_CALLED)),
        )

    def around(self, row: ModulePlan, steps: int) -> float:
        """Seconds of a module's solve beside its products."""
        values = (_STEP_VALUES * steps + _SOLVE_VALUES) * row.d_out * row.d_in
        return values / self.value + (_STEP_CALLS * steps + _SOLVE_CALLS) * self.call

    def bfloat16(self) -> float:
        """Of products of bfloat16 numbers."""
        return _product_speed(torch.bfloat16)


def _product_speed(dtype: torch.dtype) -> float:
    x, weight = (torch.ones(512, 512, dtype=dtype, device="cpu") for _ in range(2))
    return _rate(lambda: x @ weight, 2.0 * 512**3)


def _rate(work: Callable[[], object], size: float) -> float:
    """How much of it a CPU second of one thread does: the best of five."""
    with one_thread():
        work()
        best = math.inf
        for _ in range(5):
            started = time.thread_time()
            work()
            best = min(best, time.thread_time() - started)
    return size / max(best, 1e-9)
