"""`--plan --probe`: what a run takes, by one measurement of the largest module of each kind and of one block.

Weights and inputs are random numbers: no weight of the model is read. Blocks of a list share the weights of the first, so that it
takes the memory of one block, of the embeddings and of the head.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from armor_recipes.calibration.inputs import TOKENS, Batch, leading
from armor_recipes.calibration.random_inputs import draw
from armor_recipes.calibration.text import is_soon_read
from armor_recipes.compute import give_back, plain_torch
from armor_recipes.compute.memory import process_bytes
from armor_recipes.compute.threads import one_thread
from armor_recipes.evaluation.perplexity import fitting_batch
from armor_recipes.model.blocks import Stacks, find_stacks
from armor_recipes.model.calls import LayerCall
from armor_recipes.model.hooks import Hooks
from armor_recipes.model.inputs import random_inputs
from armor_recipes.model.replay import feed, forward_errors
from armor_recipes.modifiers.kinds.refiner import (
    RefinePlan,
    RefineTask,
    Student,
    UnitOutput,
    model_task,
    products_of,
)
from armor_recipes.plan import Rates, RunEstimate
from armor_recipes.plan.estimate import by_entry, kind_of, product_rates, statistic_seconds
from armor_recipes.run.planning import Job, estimated
from armor_recipes.run.refusals import resource_errors
from armor_recipes.solver import TrainableFactors

#: Tokens of a sample where the recipe names none, and windows of a batch of evaluation.
_TOKENS, _WINDOWS = 512, 8
#: Batches of two trials of a refiner, one of them held out: what the longer takes more is for batches that are trained on.
_FEW, _MORE = 2, 4


@plain_torch()
def probed(job: Job) -> RunEstimate:
    """The job's estimate from measurements on this machine, each on one thread, in CPU time.

    Takes about as long as the solve of the largest module of each entry and a few batches. Raises InputError for a model whose
    inputs its config does not tell, ResourceError where memory runs out.
    """
    read = _tokens(job)  # and with it what reading takes of memory
    with resource_errors(), one_thread(), _peak() as peak:
        model = _materialised(job)
        weights = sum({p.data_ptr(): p.nbytes for p in model.parameters()}.values())
        spec = next((e.config.calibration for e in job.recipe.modifiers if e.config.calibration is not None), None)
        length = _TOKENS if spec is None else spec.sequence_length
        inputs = random_inputs(job.shapes, min(length, job.source.facts.positions or length))
        generator = torch.Generator().manual_seed(0)
        batch = draw(inputs, 1 if spec is None else spec.batch_size, generator)
        with forward_errors(model, batch), torch.no_grad():
            token, logits = _passes(model, batch)
        size = fitting_batch(_WINDOWS, length, job.source.facts.vocab_size)
        evaluated = draw(inputs, size, generator)
        with forward_errors(model, evaluated), torch.no_grad():
            _passes(model, evaluated)
        counted = product_rates(job.plan, job.shapes, job.modifiers)
        measured = token, logits, *_solves(job, counted), _trained(job, model, inputs)
        del model
    rates = Rates(*measured, beside=max(0, peak[0] - weights), probed=True, likeness=counted.likeness)
    return estimated(job, tokens=read, rates=rates)


def _tokens(job: Job) -> int | None:
    """Tokens that are evaluated, where that takes no more than seconds to find out."""
    if job.recipe.evaluation is None or not all(map(is_soon_read, job.recipe.evaluation.datasets)):
        return None
    return sum(measure.tokens for measure in job.data(wanted=is_soon_read).measures)


def _materialised(job: Job) -> nn.Module:
    """The model with random weights, in its compute dtype."""
    model: nn.Module = copy.deepcopy(job.shapes)
    stacks = find_stacks(job.shapes)
    generator = torch.Generator().manual_seed(0)
    made: dict[object, nn.Parameter] = {}
    for name, parameter in job.shapes.named_parameters(remove_duplicate=False):
        owner, _, last = name.rpartition(".")
        key = _place(stacks, name, parameter)
        if key not in made:
            dtype = job.source.compute_dtype if parameter.is_floating_point() else parameter.dtype
            value = (
                torch.randn(parameter.shape, generator=generator) * 0.02
                if parameter.ndim > 1
                else torch.ones(parameter.shape)
            )
            made[key] = nn.Parameter(value.to(dtype), requires_grad=False)
        model.get_submodule(owner)._parameters[last] = made[key]
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = (
                    torch.rand(buffer.shape, generator=generator).to(buffer.dtype)
                    if buffer.is_floating_point()
                    else torch.zeros(buffer.shape, dtype=buffer.dtype)
                )
    return model.eval()


def _place(stacks: Stacks, name: str, parameter: Tensor) -> object:
    """What parameters that may be one have in common: their place in a block of one list, or that they are one in the model."""
    block = stacks.block_of(name)
    if block is None or not any(block in stack.indices for stack in stacks.all):
        return id(parameter)
    return stacks.of_block(block).name, name.removeprefix(f"{stacks.block_name(block)}."), tuple(parameter.shape)


def _passes(model: nn.Module, batch: Batch) -> tuple[float, float]:
    """CPU seconds of one token in all blocks, and in the rest of a pass with the loss of its logits."""
    blocks = [block for stack in find_stacks(model).all for block in stack.modules]
    spent, begun = [0.0], [0.0]

    def start(*_: Any) -> None:
        begun[0] = time.process_time()

    def stop(*_: Any) -> None:
        spent[0] += time.process_time() - begun[0]

    with Hooks() as hooks:
        for block in blocks:
            hooks.before(block, start)
            hooks.after(block, stop)
        feed(model, batch)  # warms up
        spent[0], started = 0.0, time.process_time()
        logits = getattr(feed(model, batch), "logits", None)
        if TOKENS in batch and isinstance(logits, Tensor) and logits.ndim == 3:
            for row in logits:
                functional.cross_entropy(row.float(), row.argmax(-1))
        whole = time.process_time() - started
    tokens = leading(batch).shape[:2].numel() if TOKENS in batch else len(leading(batch)) * _TOKENS
    return spent[0] / tokens, (whole - spent[0]) / tokens


@contextmanager
def _peak() -> Iterator[list[int]]:
    """By how many bytes the resident set grew inside, once it is left; 0 where no peak can be reset (but on Linux)."""
    found, before = [0], None
    give_back()
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
        before = process_bytes("VmHWM")
    yield found
    if before is not None:
        found[0] = process_bytes("VmHWM") - before


def _solves(job: Job, counted: Rates) -> tuple[dict[object, float], dict[str, float]]:
    """CPU seconds for an operation of a solve, by entry and shape, and for one token in an entry's statistics.

    Of each entry and shape the module with the most to do is tried; what has no trial is as `counted`.
    """
    solve: dict[object, float] = {}
    statistic = dict(counted.statistic)
    for key, rows in by_entry(job.plan).items():
        modifier, widest = job.modifiers[key], 0
        largest = {kind_of(row): row for row in sorted(rows, key=lambda row: row.flops)}
        for kind, row in largest.items():
            found = modifier.kind.trial(modifier, row)
            if found is not None and row.flops:
                solve[kind] = found.solve / row.flops
                if row.d_in > widest:
                    widest, statistic[key] = row.d_in, statistic_seconds(modifier, rows, row.d_in, found.token)
    return {"": max(solve.values(), default=counted.solve[""]), **solve}, statistic


def _trained(job: Job, model: nn.Module, inputs: Any) -> dict[str, float]:
    """By refiner: CPU seconds of one token in all of its units and epochs."""
    found: dict[str, float] = {}
    for row in job.plan.refinements:
        alike = [other for other in job.plan.refinements if other.modifier == row.modifier]
        if row.modifier not in found:
            found[row.modifier] = _trial(job, model, inputs, row) * len(alike)
    return found


def _trial(job: Job, model: nn.Module, inputs: Any, row: RefinePlan) -> float:
    refiner: Any = job.modifiers[row.modifier]
    spec = refiner.config.calibration
    generator = torch.Generator().manual_seed(0)
    batches = [draw(inputs, spec.batch_size, generator) for _ in range(_MORE)]
    dtype = refiner.compute_dtype(next(model.parameters())) if row.layer is None else torch.float32
    factors = _factors(job, row, products_of(dtype))

    def seconds(count: int) -> float:
        task = _task(job, model, row, factors, batches[:count])
        started = time.process_time()
        refiner.refine(task, None)
        return time.process_time() - started

    seconds(_FEW)  # warms up
    each = (seconds(_MORE) - seconds(_FEW)) / (_MORE - _FEW)
    return each / leading(batches[0]).shape[:2].numel()


def _task(
    job: Job, model: nn.Module, row: RefinePlan, factors: Mapping[str, TrainableFactors], batches: Sequence[Batch]
) -> RefineTask:
    refiner: Any = job.modifiers[row.modifier]
    stacks = find_stacks(model)
    if row.layer is None:
        dense = {f"{name}.weight": model.get_parameter(f"{name}.weight") for name in factors}
        names = [name for stack in stacks.all for name in stack.names]
        return model_task(refiner, model, dense, factors, {}, batches, names=names, stride=row.logit_stride)[0]
    calls: list[LayerCall] = []
    block = stacks.block(row.layer)
    with Hooks() as hooks, torch.no_grad():
        hooks.before(block, lambda _, args, kwargs: calls.append(LayerCall.of(args, kwargs)))
        for batch in batches:
            feed(model, batch)
    student = Student.of(block, f"{row.unit}.", factors, {})

    def forward(batch: int, windows: slice = slice(None)) -> UnitOutput:
        return UnitOutput(calls[batch].part(windows).run(student.module()))

    def target(batch: int, windows: slice = slice(None)) -> UnitOutput:
        return UnitOutput(calls[batch].hidden[windows])

    return RefineTask(factors, {}, len(calls), forward, target)


def _factors(job: Job, row: RefinePlan, products: torch.dtype) -> dict[str, TrainableFactors]:
    """Random factors for each module that is trained; those of equal places in blocks are one."""
    generator, stacks = torch.Generator().manual_seed(0), find_stacks(job.shapes)
    made: dict[object, TrainableFactors] = {}
    found = {}
    for name in row.modules:
        module = job.plan.stored[name]
        assert module.block_size is not None
        key = *_inner(stacks, name), module.block_size
        if key not in made:
            (b_o, b_i), shape = module.block_size, (module.d_out, module.d_in)
            mask = (torch.arange(module.d_in) % 4 < 2).expand(shape).contiguous()
            core = (torch.randn(shape, generator=generator) * 0.02).bfloat16().float() * mask
            a, b = (torch.eye(side).repeat(count // side, 1, 1) for side, count in ((b_o, shape[0]), (b_i, shape[1])))
            made[key] = TrainableFactors(a, core, mask, b, products)
        found[name] = made[key]
    return found


def _inner(stacks: Stacks, name: str) -> tuple[str, str]:
    block = stacks.block_of(name)
    assert block is not None
    return stacks.of_block(block).name, name.removeprefix(f"{stacks.block_name(block)}.")
