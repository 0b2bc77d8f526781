"""The most memory that a run holds, of what no file stands behind: a sum of what lives in each phase, and the largest of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from armor_recipes.compute import give_back
from armor_recipes.compute.memory import process_bytes
from armor_recipes.compute.threads import at_once
from armor_recipes.model.experts import expert_of
from armor_recipes.model.facts import model_facts
from armor_recipes.modifiers import AnyModifier
from armor_recipes.modifiers.base import Settles
from armor_recipes.modifiers.kinds.contract import Row, calibration_tokens
from armor_recipes.modifiers.kinds.module import ModulePlan
from armor_recipes.plan.experts import expert_totals, held_bytes
from armor_recipes.plan.plan import Plan
from armor_recipes.plan.sets import CalibrationSets
from armor_recipes.recipe import Recipe
from armor_recipes.recipe.schema import CalibrationSpec

#: Bytes of a value while computing on a CPU: float32.
_VALUE = 4
#: Bytes that a pass keeps for its way back, for each number that a linear module reads or gives and for each logit: what was found,
#: probabilities, the gradient. And of a change of a weight that waits for its measurement.
_KEPT, _KEPT_LOGIT, _CHANGE = 6, 12, 2
#: What a batch that passes a layer takes, in numbers that its linear modules read and give: what is around them, and what the
#: allocator keeps for each thread. Measured on the embedded model.
_AROUND = 1.5
#: Copies of a tensor in float32 while it is read and rounded, or folded.
_COPIES = 3
#: Values of logits of a batch of evaluation at most, and its windows and their tokens as a rule.
_LOGITS_AT_MOST, _WINDOWS, _WINDOW = 1 << 26, 8, 512


def peak_bytes(
    plan: Plan,
    recipe: Recipe,
    model: nn.Module,
    modifiers: Mapping[str, AnyModifier[Any]],
    *,
    beside: int = 0,
    itemsize: int = _VALUE,
) -> int:
    """Of the whole run, with `beside` what any work was measured to take beside the model. A value of a pass within
    `model.memory` takes `itemsize` bytes.
    """
    sets, widths = CalibrationSets.of(recipe, modifiers, plan.rows), _Widths.of(model)
    phases = [beside, *_evaluating(recipe, plan, widths), *_going_back(plan, modifiers, sets, widths)]
    if recipe.model.memory is not None:  # weights, activations and results lie in files
        phases += [
            max(_solving(plan, itemsize), _passing(plan, sets, widths, itemsize)) + held_bytes(plan.rows, modifiers)
        ]
        return anonymous_bytes() + max(*phases, _tensor_by_tensor(model, sets))
    compressing = estimate_peak_bytes(
        model,
        sets.held_tokens,
        solve_bytes=max(_solving(plan), _passing(plan, sets, widths))
        + _originals(plan, modifiers)
        + _results(plan)
        + held_bytes(plan.rows, modifiers),
        probe=max((spec.sequence_length for spec in sets.by_entry.values()), default=0),
    )
    return max(compressing, anonymous_bytes() + weight_bytes(model) + max(phases))


def activation_bytes(
    plan: Plan,
    recipe: Recipe,
    model: nn.Module,
    modifiers: Mapping[str, AnyModifier[Any]],
    samples: Mapping[CalibrationSpec, int] | None = None,
) -> int:
    """Of all activations at the door of a block that a run holds at once, of so many samples where they were read."""
    sets = CalibrationSets.of(recipe, modifiers, plan.rows)
    read = samples or {}
    tokens = sets.held_tokens if samples is None else sum(read.get(s, 0) * s.sequence_length for s, _ in sets.held)
    return _VALUE * (model_facts(model).hidden_size or 0) * tokens


@dataclass(frozen=True, slots=True)
class _Widths:
    """Numbers of one token: what linear modules but the head read and give, experts by the share that it reaches; and logits."""

    linear: int
    logits: int

    @classmethod
    def of(cls, model: nn.Module) -> _Widths:
        head, experts, own = vocabulary(model), expert_totals(model), 0.0
        taken = model_facts(model).experts_per_token
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and module.out_features != head:
                expert = expert_of(name) if experts else None
                share = 1.0 if expert is None or taken is None else min(1.0, taken / experts[expert.layer])
                own += share * (module.in_features + module.out_features)
        return cls(int(own), head)

    def kept(self, tokens: int) -> int:
        """Bytes for the way back of so many tokens."""
        return tokens * (_KEPT * self.linear + _KEPT_LOGIT * self.logits)


def _evaluating(recipe: Recipe, plan: Plan, widths: _Widths) -> Iterator[int]:
    """A batch of the longest windows: logits and what their loss makes of them, and what one layer reads and gives."""
    specs = {} if recipe.evaluation is None else recipe.evaluation.measures
    for spec in specs.values():
        length = int(getattr(spec, "sequence_length", None) or _WINDOW)
        windows = min(_WINDOWS, max(1, _LOGITS_AT_MOST // max(1, length * widths.logits)))
        yield _VALUE * windows * length * (2 * widths.logits + widths.linear // max(1, len(plan.layers)))


def _passing(plan: Plan, sets: CalibrationSets, widths: _Widths, itemsize: int = _VALUE) -> int:
    """Batches in one layer: one for each thread, and one whose statistics wait for their turn."""
    layer, most = widths.linear // max(1, len(plan.layers)), at_once() + 1
    tokens = (min(calibration_tokens(s), most * s.batch_size * s.sequence_length) for s, _ in sets.held)
    return int(_AROUND * max((itemsize * layer * count for count in tokens), default=0))


def _going_back(
    plan: Plan, modifiers: Mapping[str, AnyModifier[Any]], sets: CalibrationSets, widths: _Widths
) -> Iterator[int]:
    """Passes through the model and back, as many at once as a CPU has threads: for gradients, and for what is not settled."""
    threads = at_once()
    for spec in sets.back:
        batches = -(-calibration_tokens(spec) // (spec.batch_size * spec.sequence_length))
        yield min(threads, batches) * widths.kept(spec.batch_size * spec.sequence_length)
    for key, spec in sets.by_entry.items():
        modifier = modifiers[key]
        if not isinstance(modifier, Settles) or modifier.unsettled is None:
            continue
        rows = [row for row in plan.modules if row.modifier == key]
        changes = _CHANGE * sum(row.d_out * row.d_in for row in rows)
        added = _VALUE * spec.sequence_length * sum(row.d_out for row in rows)
        together = min(threads, modifier.unsettled.windows)
        passes = together * (widths.kept(spec.sequence_length) + added)
        yield changes + max(passes, bytes_at_once([row.peak_bytes for row in rows]))


def _tensor_by_tensor(model: nn.Module, sets: CalibrationSets) -> int:
    """What reading, rounding, hashing or folding the largest tensor takes, or the logits of two models to verify."""
    probe = max((spec.sequence_length for spec in sets.by_entry.values()), default=0)
    largest = max((p.numel() for p in model.parameters()), default=0)
    return _VALUE * max(_COPIES * largest, 2 * probe * vocabulary(model))


def _solving(plan: Plan, itemsize: int = _VALUE) -> int:
    """Working memory of the layer, or of the other step, that needs most."""
    places: dict[tuple[str, int, str], list[ModulePlan]] = {}
    for row in plan.modules:
        places.setdefault((row.stage, row.layer, row.modifier), []).append(row)
    layers = (_in_turn(rows, itemsize) for rows in places.values())
    return max([0, *layers, *(_with_parts(row) for row in plan.rows if not row.takes)])


def _in_turn(rows: Sequence[ModulePlan], itemsize: int) -> int:
    """Of one layer's solves, in the order in which they begin, while the results of those that ended wait for the last."""
    together = at_once()
    order = rows if together == 1 else sorted(rows, key=lambda row: -row.flops)
    results = [row.d_out * row.d_in * itemsize + row.bytes_after for row in order]
    last = [max(0, i + 1 - together) for i in range(len(order))]
    return max(sum(results[:j]) + sum(row.peak_bytes for row in order[j : i + 1]) for i, j in enumerate(last))


def _originals(plan: Plan, modifiers: Mapping[str, AnyModifier[Any]]) -> int:
    """Dense weights that are kept for a modifier at the end of a stage."""
    wanted = any(modifier.needs.dense == "model" for modifier in modifiers.values())
    return sum({row.name: row.bytes_before for row in plan.modules}.values()) if wanted else 0


def _results(plan: Plan) -> int:
    """What is kept of compressed modules, as it is stored, beside the weights that are computed with."""
    return sum(row.bytes_after for row in plan.stored.values() if row.stored_as != "dense")


def bytes_at_once(solves: Sequence[int]) -> int:
    """Working memory of one layer's solves: of the largest, as many as a CPU solves at once."""
    return sum(sorted(solves, reverse=True)[: at_once()])


def _with_parts(row: Row) -> int:
    """Working memory of a step with as many of its parts as a CPU computes at once."""
    parts, size = row.side_by_side
    return row.peak_bytes + bytes_at_once([size] * parts)


def estimate_peak_bytes(model: nn.Module, tokens: int, *, solve_bytes: int, probe: int = 0) -> int:
    """The process as it is, the model, and the larger of: activations with solves, or a second copy of the model to verify.

    Verifying compares the logits of both for `probe` tokens, which are many where the vocabulary is large.
    """
    hidden = model_facts(model).hidden_size or 0
    weights = weight_bytes(model)
    activations = _VALUE * hidden * tokens
    verifying = 2 * (weights + _VALUE * probe * vocabulary(model))
    return anonymous_bytes() + weights + max(activations + solve_bytes, verifying)


def weight_bytes(model: nn.Module) -> int:
    """Of all parameters while computing."""
    return _VALUE * sum(p.numel() for p in model.parameters())


def vocabulary(model: nn.Module) -> int:
    """Rows of the head that gives logits of tokens; 0 without one."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return 0 if weight is None else len(weight)


def anonymous_bytes() -> int:
    """Memory of this process that no file stands behind, once what is free is given back; 0 where the system does not say it."""
    give_back()
    return process_bytes("RssAnon")
