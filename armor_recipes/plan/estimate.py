"""What a plan will take on this machine: estimates, for `--plan` and the report, never for a decision."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from armor_recipes.model.facts import model_facts
from armor_recipes.modifiers import AnyModifier
from armor_recipes.modifiers.base import KnowsItsSize
from armor_recipes.modifiers.kinds.contract import Row, calibration_tokens
from armor_recipes.modifiers.kinds.module import ModulePlan
from armor_recipes.modifiers.kinds.refiner import RefinePlan
from armor_recipes.modifiers.threads import one_thread
from armor_recipes.plan.experts import held_bytes
from armor_recipes.plan.plan import Plan
from armor_recipes.recipe import Recipe
from armor_recipes.recipe.schema import CalibrationSpec

#: Bytes of a value while computing on a CPU: float32.
_VALUE = 4
#: What a pass of the blocks costs to each number that a linear module reads or gives, beside the products: norms, activations.
_AROUND = 1.0
#: Backward passes go through the products of A, S and B again: forward, B x once more, to x, and to A and B.
_FACTOR_PRODUCTS = 4
#: Values of logits of a batch of evaluation at most, and its windows and their tokens as a rule.
_LOGITS_AT_MOST, _WINDOWS, _WINDOW = 1 << 26, 8, 512
#: Times that each logit is looked at by a distillation's loss: two softmaxes, their exponentials, the gradient.
_LOOKS = 4


@dataclass(frozen=True, slots=True)
class RunEstimate:
    """What a run takes on this machine, evaluation included.

    Attributes:
        peak_bytes: of memory.
        seconds: on so many `threads`.
        cpu_seconds: of all threads.
        cpu_seconds_by: CPU seconds by what takes them.
        probed: whether it rests on a measurement of the model's own modules, and not of products alone.
        uncounted: sentences about what is not in it.
    """

    peak_bytes: int
    seconds: float
    cpu_seconds: float = 0.0
    cpu_seconds_by: Mapping[str, float] = field(default_factory=dict)
    threads: int = 1
    probed: bool = False
    uncounted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Rates:
    """CPU seconds on this machine, of one thread.

    Attributes:
        token: one token through all blocks, forward.
        logits: one token's logits from hidden states, with their loss.
        solve: an operation of a solve, by `kind_of` its row; `""` for all others.
        statistic: one token in all statistics of an entry, by its key.
        trained: one token in all units and epochs of a refiner, by its key.
        beside: bytes that a batch of evaluation takes beside the model; where all was measured, that the most of any work does.
        probed: whether the model's own modules were measured.
    """

    token: float
    logits: float
    solve: Mapping[object, float]
    statistic: Mapping[str, float]
    trained: Mapping[str, float]
    beside: int = 0
    probed: bool = False


def estimate_run(
    plan: Plan,
    recipe: Recipe,
    model: nn.Module,
    modifiers: Mapping[str, AnyModifier[Any]],
    *,
    rates: Rates | None = None,
    evaluated: int | None = None,
) -> RunEstimate:
    """Add up the plan's work at the given rates, or at those of products that are measured here and now.

    `model` may be on the meta device. `evaluated` are the tokens of the recipe's measures where they are known; else those that the
    recipe names.
    """
    found, sets = rates or product_rates(plan, model, modifiers), _Sets.of(recipe, modifiers)
    measured, uncounted = _evaluated(recipe) if evaluated is None else (evaluated, ())
    work = _work(plan, sets, found, measured)
    cpu, threads = sum(work.values()), torch.get_num_threads()
    return RunEstimate(
        peak_bytes=_peak_bytes(plan, model, modifiers, sets, found, evaluates=bool(measured)),
        seconds=round(cpu / threads, 1),
        cpu_seconds=round(cpu, 1),
        cpu_seconds_by={name: round(each, 1) for name, each in work.items()},
        threads=threads,
        probed=found.probed,
        uncounted=uncounted,
    )


@dataclass(frozen=True, slots=True)
class _Sets:
    """The calibration sets of a recipe: by entry; those that are held as activations, with the model that they are of; and those
    that go through the model and back.
    """

    by_entry: Mapping[str, CalibrationSpec]
    held: Set[tuple[CalibrationSpec, str]]
    back: Set[CalibrationSpec]

    @classmethod
    def of(cls, recipe: Recipe, modifiers: Mapping[str, AnyModifier[Any]]) -> _Sets:
        specs = {e.key: e.config.calibration for e in recipe.modifiers if e.config.calibration is not None}
        needs = {key: modifiers[key].needs for key in specs}
        held: set[tuple[CalibrationSpec, str]] = {(specs[key], kind) for key in specs for kind in needs[key].streams}
        held |= {(specs[key], "inputs of the dense block") for key in specs if needs[key].dense == "block"}
        return cls(specs, held, {specs[key] for key in specs if needs[key].gradients})

    def tokens_of(self, key: str) -> int:
        """Those of an entry; 0 of one that is not calibrated."""
        return calibration_tokens(self.by_entry[key]) if key in self.by_entry else 0


def _work(plan: Plan, sets: _Sets, rates: Rates, evaluated: int) -> dict[str, float]:
    """CPU seconds by what takes them."""
    # A dense stream is observed as it passes, a compressed one before; gradients go forward and back.
    passed = sum(calibration_tokens(spec) * (1 if kind == "dense" else 2) for spec, kind in sets.held)
    gradients = sum(map(calibration_tokens, sets.back))
    solves = [(row, rates.solve[""]) for row in plan.rows if row.takes and row.section != ModulePlan.section]
    solves += [(row, rates.solve.get(kind_of(row), rates.solve[""])) for row in plan.modules]
    trained = {row.modifier for row in plan.rows if not row.takes and row.section == "refinements"}
    return {
        "passes": passed * rates.token + gradients * (2 * rates.token + rates.logits),
        "statistics": sum(sets.tokens_of(key) * each for key, each in rates.statistic.items()),
        "solving": sum(row.flops * each for row, each in solves),
        "training": sum(sets.tokens_of(key) * each for key, each in rates.trained.items() if key in trained),
        "evaluation": 2 * evaluated * (rates.token + rates.logits),
    }


def _peak_bytes(
    plan: Plan,
    model: nn.Module,
    modifiers: Mapping[str, AnyModifier[Any]],
    sets: _Sets,
    rates: Rates,
    *,
    evaluates: bool,
) -> int:
    """The most memory that any phase takes."""
    places: dict[tuple[str, int, str], list[int]] = {}
    for row in plan.modules:
        places.setdefault((row.stage, row.layer, row.modifier), []).append(row.peak_bytes)
    others = [_with_parts(row) for row in plan.rows if not row.takes]
    working = max([0, *map(bytes_at_once, places.values()), *others])
    if rates.probed:  # on one thread
        alone = max([0, *map(max, places.values()), *(_with_parts(row, 1) for row in plan.rows if not row.takes)])
        working = rates.beside + max(0, working - alone)
    peak = estimate_peak_bytes(
        model,
        sum(calibration_tokens(spec) for spec, _ in sets.held),
        solve_bytes=working + held_bytes(plan.rows, modifiers),
        probe=max((spec.sequence_length for spec in sets.by_entry.values()), default=0),
    )
    return max(peak, resident_bytes() + _weights(model) + rates.beside if evaluates else 0)


def activation_bytes(recipe: Recipe, model: nn.Module, modifiers: Mapping[str, AnyModifier[Any]]) -> int:
    """Of all activations at the door of a block that a run holds at once."""
    tokens = sum(calibration_tokens(spec) for spec, _ in _Sets.of(recipe, modifiers).held)
    return _VALUE * (model_facts(model).hidden_size or 0) * tokens


def _evaluated(recipe: Recipe) -> tuple[int, tuple[str, ...]]:
    """Tokens of one round of the measures, as the recipe names them, and what it does not name."""
    tokens, unknown = 0, []
    for name, spec in ({} if recipe.evaluation is None else recipe.evaluation.measures).items():
        count = getattr(spec, "windows", None) or getattr(spec, "samples", None)
        if isinstance(count, int):
            tokens += count * int(getattr(spec, "sequence_length", 0))
        else:
            unknown.append(name)
    text = "the evaluation of {} is not counted: how long the data are shows once they are read"
    return tokens, (text.format(" and ".join(unknown)),) if unknown else ()


def product_rates(plan: Plan, model: nn.Module, modifiers: Mapping[str, AnyModifier[Any]]) -> Rates:
    """Rates by counted operations, at the speed of products that are measured here and now."""
    speeds = _Speeds.measured()
    inside = [m for m in model.modules() if isinstance(m, nn.Linear)]
    head = _vocabulary(model)
    hidden = model_facts(model).hidden_size or 0
    parameters = sum(m.weight.numel() for m in inside) - (
        head * hidden if any(m.out_features == head for m in inside) else 0
    )
    around = sum(m.in_features + m.out_features for m in inside if m.out_features != head)
    token = 2.0 * parameters / speeds.product + _AROUND * around / speeds.value
    logits = 2.0 * head * hidden / speeds.product + head / speeds.value
    trained: dict[str, float] = {}
    for row in plan.rows:
        if not isinstance(row, RefinePlan):
            continue
        refiner: Any = modifiers[row.modifier]
        half = row.layer is None and refiner.compute_dtype(torch.empty(0)) == torch.bfloat16
        stored = [plan.stored[name] for name in row.modules if name in plan.stored]
        factors = sum(m.d_out * m.block_size[0] + m.d_in * m.block_size[1] for m in stored if m.block_size is not None)
        values = 3.0 * sum(m.d_out + m.d_in for m in stored)
        looks = _LOOKS * head / row.logit_stride if row.layer is None else 0.0
        each = row.flops / row.tokens / (speeds.bfloat16() if half else speeds.product)
        each += refiner.epochs * (2.0 * _FACTOR_PRODUCTS * factors / speeds.solve + (values + looks) / speeds.value)
        trained[row.modifier] = trained.get(row.modifier, 0.0) + each
    statistic = {}
    for key, rows in by_entry(plan).items():
        grams = sum(d_in**2 for d_in in _read(rows) if _is_gram(modifiers[key], rows, d_in))
        statistic[key] = 2.0 * grams / speeds.product + sum(_read(rows)) / speeds.value
    batch = min(_LOGITS_AT_MOST, _WINDOWS * _WINDOW * head)
    return Rates(token, logits, {"": 1 / speeds.solve}, statistic, trained, beside=2 * _VALUE * batch)


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
    """Of one thread, in operations (`value`: in numbers through a softmax) a second of CPU time."""

    solve: float
    product: float
    value: float

    @classmethod
    def measured(cls) -> _Speeds:
        """Blocks as solves multiply them, a product as passes have it, and rows of logits."""
        left, right = (torch.ones(16, rows, 64, dtype=torch.float32, device="cpu") for rows in (512, 64))
        rows = torch.ones(64, 8192, dtype=torch.float32, device="cpu")
        return cls(
            solve=_rate(lambda: torch.bmm(left, right), 2.0 * 16 * 512 * 64 * 64),
            product=_product_speed(torch.float32),
            value=_rate(lambda: rows.log_softmax(-1), float(rows.numel())),
        )

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


def bytes_at_once(solves: Sequence[int]) -> int:
    """Working memory of one layer's solves: of the largest, as many as a CPU solves at once."""
    return sum(sorted(solves, reverse=True)[: torch.get_num_threads()])


def _with_parts(row: Row, at_most: int | None = None) -> int:
    """Working memory of a step with as many of its parts as a CPU computes at once, or so many at most."""
    parts, size = row.side_by_side
    return row.peak_bytes + bytes_at_once([size] * parts if at_most is None else [size] * min(parts, at_most))


def estimate_peak_bytes(model: nn.Module, tokens: int, *, solve_bytes: int, probe: int = 0) -> int:
    """The process as it is, the model, and the larger of: activations with solves, or a second copy of the model to verify.

    Verifying compares the logits of both for `probe` tokens, which are many where the vocabulary is large.
    """
    hidden = model_facts(model).hidden_size or 0
    weights = _weights(model)
    activations = _VALUE * hidden * tokens
    verifying = 2 * (weights + _VALUE * probe * _vocabulary(model))
    return resident_bytes() + weights + max(activations + solve_bytes, verifying)


def _weights(model: nn.Module) -> int:
    return _VALUE * sum(p.numel() for p in model.parameters())


def _vocabulary(model: nn.Module) -> int:
    """Rows of the head that gives logits of tokens; 0 without one."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return 0 if weight is None else len(weight)


def resident_bytes() -> int:
    """Memory this process holds now; 0 where the system does not say (`/proc` is Linux's)."""
    status = Path("/proc/self/statm")
    return int(status.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if status.exists() else 0
