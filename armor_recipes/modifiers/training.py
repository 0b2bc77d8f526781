"""What refiners share: steps over the factors with a learning rate relative to each tensor, and a stop on held-out batches."""

from __future__ import annotations

import math
import statistics
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from armor_recipes.errors import PlanError
from armor_recipes.modifiers.base import Estimate, SolveProgress
from armor_recipes.modifiers.kinds.contract import Snapshot
from armor_recipes.modifiers.kinds.refiner import RefineOutcome, Refiner, RefineTask, RefineUnit, UnitOutput
from armor_recipes.modifiers.optimizers import Optimizer
from armor_recipes.modifiers.passes import Passes, passes_of
from armor_recipes.modifiers.seeding import module_seed
from armor_recipes.recipe.schema import ModifierConfig

_WARM_UP, _LAST_RATE = 0.05, 0.02
#: A batch's gradient longer than so many times the median of those before it is shortened to that (AutoClip, arXiv 2007.14469).
#: One window among hundreds can have a gradient hundreds of times as long, which Adam's moments would not forget for many steps.
_LONGEST = 2.0
#: What a step costs in forward passes: two without gradients of the core, three with, and one of the dense model where that runs
#: along. Copies of what is trained: itself, the best, the gradients of a step, of a batch and of a part that waits for its turn,
#: and Adam's two moments.
_PASSES, _PASSES_WITH_CORE, _COPIES = 2, 3, 7
#: Bytes of S and its mask for each number of a weight, less those of the weight, which is given back meanwhile: S in two orders
#: where it stays, 16 bits and a column for each kept value, and where the rows begin; in float32 where it is trained.
_CORE, _CORE_TRAINED = 5.25 - 4, 5 - 4
#: Bytes that a part of a batch keeps for its way back, for each number that a module reads or gives (5.4 in a layer of the embedded
#: model, 6.3 in all of it) and for each of the output: what is found, what is wanted, and the gradient.
_KEPT, _KEPT_OUTPUT = 6, 12


def learning_rate_field(default: float) -> Any:
    """The field `learning_rate`, whose default is the refiner's own."""
    return Field(
        default=default,
        gt=0,
        le=1,
        title="Learning rate",
        description="The step as a share of each tensor's root mean square; warmed up over 5 %, then a cosine.",
    )


class RefineConfig(ModifierConfig):
    """Fields of every modifier that trains factors made before it."""

    needs_calibration: ClassVar[bool] = True

    targets: tuple[str, ...] = Field(
        default=("Linear",),
        min_length=1,
        title="Targets",
        description="Modules to train. Those among them that an earlier modifier of the stage factorised are trained; the "
        "plan counts them.",
    )
    epochs: Annotated[int, Field(strict=True, ge=1)] = Field(
        default=1,
        title="Epochs",
        description="Passes over the calibration batches at most; a pass that does not lower the held-out loss is the last.",
    )
    learning_rate: float = learning_rate_field(5e-4)
    optimizer: Literal["adam", "muon"] = Field(
        default="adam",
        title="Optimizer",
        description="`muon`: for the blocks of A and B, steps whose singular values are about 1; the rest is Adam's in any case.",
    )
    held_out: Annotated[float, Field(gt=0, le=0.5)] = Field(
        default=0.05,
        title="Held-out share",
        description="Share of the calibration batches (`calibration.batch_size` windows each) that is not trained on but decides.",
    )
    accumulate: Annotated[int, Field(strict=True, ge=1)] = Field(
        default=2,
        title="Batches in a step",
        description="Calibration batches whose gradients are averaged in one step. It does not limit the threads: a CPU computes "
        "all windows of a step side by side.",
    )
    core: Annotated[bool, Field(strict=True)] = Field(
        default=False,
        title="Train the core",
        description="Train the kept values of S too, and not A and B alone. A step takes about half as long again. A "
        "quantised core stays as it is.",
    )
    norms: Annotated[bool, Field(strict=True)] = Field(
        default=True,
        title="Train norms",
        description="Train the weights of norms too; they cost no bytes.",
    )


C = TypeVar("C", bound=RefineConfig)


class TrainingRefiner(Refiner[C]):
    """A refiner that says only what its loss is."""

    @property
    def trains_core(self) -> bool:
        """As the config says."""
        return self.config.core

    @property
    def epochs(self) -> int:
        """As the config says."""
        return self.config.epochs

    def plan(self, unit: RefineUnit) -> Estimate:
        """Costs of the passes. Raises PlanError where no batch is left to decide on."""
        _check_batches(-(-unit.tokens // unit.batch_tokens))
        weights = sum(m.d_out * m.d_in for m in unit.modules)
        trained = unit.factor_values - (0 if self.config.core else weights // 2)
        beside = self.scope == "model"  # the dense model, its weights in 16 bits; a layer's targets are there already
        passes = (_PASSES_WITH_CORE if self.config.core else _PASSES) + beside
        stride = self.logit_stride(unit)
        kept = _KEPT * sum(m.d_out + m.d_in for m in unit.modules) + _KEPT_OUTPUT * unit.width // stride
        return Estimate(
            stored_bytes=0,
            flops=2.0 * passes * (unit.parameters - unit.head + unit.head / stride) * unit.tokens * self.config.epochs,
            peak_bytes=4 * _COPIES * trained + int(weights * (_CORE_TRAINED if self.config.core else _CORE)),
            parts=self.config.accumulate * unit.batch_parts,
            part_bytes=4 * trained + kept * unit.batch_tokens // unit.batch_parts,
        )

    def check_windows(self, origins: Sequence[int]) -> None:
        """Raise PlanError where they make no batch to decide on beside one to train on."""
        assert self.config.calibration is not None
        _check_batches(-(-len(origins) // self.config.calibration.batch_size))

    def refine(self, task: RefineTask, on_progress: SolveProgress | None) -> RefineOutcome:
        """Train and leave the factors and vectors at their best held-out loss. Raises PlanError for one batch, NumericalError."""
        _check_batches(task.batches)
        vectors = task.vectors if self.config.norms else {}
        for factors in task.factors.values() if self.config.core else ():
            factors.train_core()
        parts = [p for factors in task.factors.values() for p in factors.parameters()]
        parameters = list(dict.fromkeys([*parts, *vectors.values()]))  # modules may share a B
        seed = module_seed(self.config.seed, next(iter(task.factors)))
        with passes_of(task, parameters, self) as passes:
            return train(_Training(passes, self.config, seed), on_progress)

    @abstractmethod
    def loss(self, found: UnitOutput, wanted: UnitOutput) -> Tensor:
        """Scalar loss of what the unit makes of a batch or of some of its windows, given what the dense unit does.

        Differentiable in the first. A batch's is the mean of its parts' by their `weight`, up to rounding.
        """

    def weight(self, wanted: UnitOutput) -> float:
        """How much some windows count in their batch, from what the dense unit makes of them: by default as many tokens they are.

        A loss that is relative to a size of the target weighs by that size. What weighs 0 is left out.
        """
        return float(wanted.output.shape[:-1].numel())


@dataclass(frozen=True, slots=True)
class _Training:
    passes: Passes
    config: RefineConfig
    seed: int

    @property
    def parameters(self) -> Sequence[nn.Parameter]:
        """All that is trained."""
        return self.passes.parameters

    def refresh(self) -> None:
        """Let the factors know that their parameters have changed."""
        for factors in self.passes.task.factors.values():
            factors.refresh()

    def held_out_loss(self, held: Sequence[int]) -> float:
        """Mean loss of some batches."""
        return sum(self.passes.losses(held)) / len(held)


def train(training: _Training, on_progress: SolveProgress | None) -> RefineOutcome:
    """Epochs over the batches that are not held out, in an order of the seed's; the best state on those that are is kept.

    Where the task has a snapshot that holds a state, it goes on from there: what comes out is the same, bit for bit.

    Raises NumericalError where a loss is not finite.
    """
    config, snapshot = training.config, training.passes.task.snapshot
    held, trained = split_batches(training.passes.task.batches, config.held_out)
    steps = -(-len(trained) // config.accumulate)
    total = config.epochs * steps
    optimizer = Optimizer(training.parameters, config.optimizer)
    generator = torch.Generator().manual_seed(training.seed)
    state = _State(training.parameters, optimizer)
    if state.restored(snapshot):
        training.refresh()
    else:
        state.losses.append(training.held_out_loss(held))
    losses = state.losses
    for epoch in range(config.epochs):
        order = [trained[i] for i in torch.randperm(len(trained), generator=generator).tolist()]
        groups = [order[first : first + config.accumulate] for first in range(0, len(order), config.accumulate)]
        for place, (batches, coming) in enumerate(pairwise([*groups, []]), start=epoch * steps):
            if place < state.step:
                continue
            rate = config.learning_rate * schedule(state.step, total)
            state.clipped += _step(training, optimizer, batches, coming, state.lengths, rate=rate)
            state.step += 1
            if on_progress is not None:
                on_progress(state.step, total, losses[-1])
            if snapshot is not None and snapshot.due():
                snapshot.save(*state.saved)
        if len(losses) > epoch + 1:  # a run before has measured it
            continue
        losses.append(training.held_out_loss(held))
        if losses[-1] >= min(losses[:-1]):
            break
        state.keep()
    state.take_best()
    training.refresh()
    stopped = "epochs" if state.step == total and losses[-1] <= min(losses) else "held-out loss"
    return RefineOutcome(tuple(losses), state.step, stopped, state.clipped)


class _State:
    """Where a training is: parameters and moments, the best parameters at the end of an epoch, and what was counted.

    Attributes:
        losses: held-out ones, before training and after each epoch.
        lengths: of the gradients of all batches so far.
        step: how many steps were taken.
        clipped: how many gradients were shortened.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: Optimizer) -> None:
        self._parameters, self._optimizer = parameters, optimizer
        self._best: list[Tensor] = []
        self.losses: list[float] = []
        self.lengths: list[float] = []
        self.step = self.clipped = 0
        self.keep()

    def keep(self) -> None:
        """The parameters are the best so far."""
        self._best = [parameter.detach().clone() for parameter in self._parameters]

    def take_best(self) -> None:
        """Put the best ones in their place."""
        self._take(self._best)

    @torch.no_grad()
    def _take(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip(self._parameters, values, strict=True):
            parameter.copy_(value)

    @property
    def saved(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """All of it, as a snapshot takes it."""
        tensors = {f"now/{place}": parameter.detach() for place, parameter in enumerate(self._parameters)}
        tensors |= {f"best/{place}": value for place, value in enumerate(self._best)}
        counts = {name: getattr(self, name) for name in ("losses", "lengths", "step", "clipped")}
        return tensors | {f"moments/{name}": value for name, value in self._optimizer.state.items()}, counts

    def restored(self, snapshot: Snapshot | None) -> bool:
        """Whether a snapshot held a state, which then is this one."""
        found = None if snapshot is None else snapshot.load()
        if found is None:
            return False
        tensors, counts = found
        self._take([tensors[f"now/{place}"] for place in range(len(self._parameters))])
        self._best = [tensors[f"best/{place}"] for place in range(len(self._parameters))]
        start = "moments/"
        self._optimizer.restore({n.removeprefix(start): x for n, x in tensors.items() if n.startswith(start)})
        for name, value in counts.items():
            setattr(self, name, value)
        return True


def _check_batches(batches: int) -> None:
    if batches < 2:
        raise PlanError(
            f"training needs at least 2 calibration batches, one of them held out; there is {batches}: raise "
            "`calibration.samples` or lower `calibration.batch_size`"
        )


def split_batches(batches: int, share: float) -> tuple[list[int], list[int]]:
    """Held-out and training batches: the share, at least one, evenly spread; at least one is left to train on."""
    count = min(max(1, round(batches * share)), batches - 1)
    held = [(2 * i + 1) * batches // (2 * count) for i in range(count)]
    return held, [i for i in range(batches) if i not in set(held)]


def schedule(step: int, total: int) -> float:
    """Share of the learning rate at a step: up over the first 5 %, then a cosine down to 2 %."""
    warm = min(1.0, (step + 1) / max(1.0, _WARM_UP * total))
    return warm * (_LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / total)))


def _step(
    training: _Training,
    optimizer: Optimizer,
    batches: Sequence[int],
    coming: Sequence[int],
    lengths: list[float],
    *,
    rate: float,
) -> int:
    """One step of the optimizer; adds to the `lengths` of gradients so far, and returns how many were shortened."""
    clipped = 0
    for found in training.passes.gradients(batches, coming):  # summed in the order of the batches
        longest = _LONGEST * statistics.median(lengths) if lengths else found.length
        lengths.append(found.length)
        clipped += found.length > longest
        weight = found.scale * ((longest / found.length if found.length > longest else 1.0) / len(batches))
        for parameter, gradient in zip(training.parameters, found.parts, strict=True):
            share = gradient * weight
            parameter.grad = share if parameter.grad is None else parameter.grad.add_(share)
    optimizer.step(rate, training.passes.pool)
    training.refresh()
    return clipped
