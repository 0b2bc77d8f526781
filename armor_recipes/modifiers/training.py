"""What refiners share: Adam over the factors with a learning rate relative to each tensor, and a stop on held-out batches."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from armor_recipes.errors import NumericalError, PlanError
from armor_recipes.modifiers.base import Estimate, RefineOutcome, Refiner, RefineTask, RefineUnit, SolveProgress
from armor_recipes.modifiers.seeding import module_seed
from armor_recipes.recipe.schema import ModifierConfig

_BETAS = (0.9, 0.95)
#: Losses and so gradients are tiny where activations are; Adam's usual 1e-8 would damp its steps there.
_EPSILON = 1e-15
_WARM_UP, _LAST_RATE = 0.05, 0.02
#: A forward and a backward pass are worth three forward ones; values of one weight that training keeps: itself, its
#: gradient, and Adam's two moments.
_PASSES, _COPIES = 3, 4
#: Values in one sum: few enough that torch does not split it over threads, on whose number its bits would then depend.
_SUMMED_AT_ONCE = 1 << 14


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
    learning_rate: Annotated[float, Field(gt=0, le=1)] = Field(
        default=5e-4,
        title="Learning rate",
        description="Adam's step as a share of each tensor's root mean square; warmed up over 5 %, then a cosine.",
    )
    held_out: Annotated[float, Field(gt=0, le=0.5)] = Field(
        default=0.05,
        title="Held-out share",
        description="Share of the calibration batches (`calibration.batch_size` windows each) that is not trained on but decides.",
    )
    norms: Annotated[bool, Field(strict=True)] = Field(
        default=True,
        title="Train norms",
        description="Train the weights of norms too; they cost no bytes.",
    )


C = TypeVar("C", bound=RefineConfig)


class TrainingRefiner(Refiner[C]):
    """A refiner that says only what its loss is."""

    def plan(self, unit: RefineUnit) -> Estimate:
        """Costs of the passes. Raises PlanError where no batch is left to decide on."""
        _check_batches(-(-unit.tokens // unit.batch_tokens))
        return Estimate(
            stored_bytes=0,
            flops=2.0 * _PASSES * unit.parameters * unit.tokens * self.config.epochs,
            peak_bytes=4 * (_COPIES * unit.factor_values + 2 * sum(m.d_out * m.d_in for m in unit.modules)),
        )

    def refine(self, task: RefineTask, on_progress: SolveProgress | None) -> RefineOutcome:
        """Train and leave the factors and vectors at their best held-out loss.

        Raises PlanError where fewer windows came than were planned (`samples: {at_most: N}`), and NumericalError.
        """
        _check_batches(task.batches)
        vectors = task.vectors if self.config.norms else {}
        parts = [p for factors in task.factors.values() for p in factors.parameters()]
        parameters = list(dict.fromkeys([*parts, *vectors.values()]))  # modules may share a B
        seed = module_seed(self.config.seed, next(iter(task.factors)))
        return train(_Training(task, parameters, self.loss, self.config, seed), on_progress)

    @abstractmethod
    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Scalar loss of one batch's outputs `(B, L, C)`, differentiable in the first."""


@dataclass(frozen=True, slots=True)
class _Training:
    task: RefineTask
    parameters: list[nn.Parameter]
    loss: Callable[[Tensor, Tensor], Tensor]
    config: RefineConfig
    seed: int

    def batch_loss(self, batch: int) -> Tensor:
        with torch.no_grad():
            target = self.task.target(batch)
        return self.loss(self.task.forward(batch), target)


def train(training: _Training, on_progress: SolveProgress | None) -> RefineOutcome:
    """Epochs over the batches that are not held out, in an order of the seed's; the best state on those that are is kept.

    Raises NumericalError where a loss is not finite.
    """
    config = training.config
    held, trained = split_batches(training.task.batches, config.held_out)
    total = config.epochs * len(trained)
    optimizer = _optimizer(training.parameters)
    generator = torch.Generator().manual_seed(training.seed)
    losses = [_held_out_loss(training, held)]
    kept = [p.detach().clone() for p in training.parameters]
    step = 0
    for _ in range(config.epochs):
        for position in torch.randperm(len(trained), generator=generator).tolist():
            _step(training, optimizer, trained[position], rate=config.learning_rate * schedule(step, total))
            step += 1
            if on_progress is not None:
                on_progress(step, total, losses[-1])
        losses.append(_held_out_loss(training, held))
        if losses[-1] >= min(losses[:-1]):
            break
        kept = [p.detach().clone() for p in training.parameters]
    with torch.no_grad():
        for parameter, value in zip(training.parameters, kept, strict=True):
            parameter.copy_(value)
    return RefineOutcome(
        tuple(losses), step, "epochs" if step == total and losses[-1] <= min(losses) else "held-out loss"
    )


def _check_batches(batches: int) -> None:
    if batches < 2:
        raise PlanError(
            f"training needs at least 2 calibration batches, one of them held out; there is {batches}: raise "
            "`calibration.samples` or lower `calibration.batch_size`"
        )


def token_sum(x: Tensor) -> Tensor:
    """Sum of `(B, L, C)`, token by token and then window by window: its bits do not depend on the number of threads."""
    return x.sum(-1).sum(-1).sum()


def split_batches(batches: int, share: float) -> tuple[list[int], list[int]]:
    """Held-out and training batches: the share, at least one, evenly spread; at least one is left to train on."""
    count = min(max(1, round(batches * share)), batches - 1)
    held = [(2 * i + 1) * batches // (2 * count) for i in range(count)]
    return held, [i for i in range(batches) if i not in set(held)]


def schedule(step: int, total: int) -> float:
    """Share of the learning rate at a step: up over the first 5 %, then a cosine down to 2 %."""
    warm = min(1.0, (step + 1) / max(1.0, _WARM_UP * total))
    return warm * (_LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + math.cos(math.pi * step / total)))


def _optimizer(parameters: list[nn.Parameter]) -> torch.optim.Adam:
    groups = [{"params": [p], "scale": root_mean_square(p.detach())} for p in parameters]
    return torch.optim.Adam(groups, lr=0.0, betas=_BETAS, eps=_EPSILON, fused=True)


def root_mean_square(x: Tensor) -> float:
    """Of all numbers of a tensor; its bits do not depend on the number of threads either."""
    parts = [part.square().sum(dtype=torch.float64) for part in x.flatten().split(_SUMMED_AT_ONCE)]
    return math.sqrt(float(torch.stack(parts).sum()) / x.numel())


def _step(training: _Training, optimizer: torch.optim.Adam, batch: int, *, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
    with torch.enable_grad():
        loss = training.batch_loss(batch)
        loss.backward()
    if not math.isfinite(float(loss.detach())):
        raise NumericalError(f"the training loss became {float(loss.detach())}: lower `learning_rate`")
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _held_out_loss(training: _Training, held: list[int]) -> float:
    with torch.no_grad():
        value = sum(float(training.batch_loss(batch)) for batch in held) / len(held)
    if not math.isfinite(value):
        raise NumericalError(f"the held-out loss is {value}: lower `learning_rate`, or check the model's weights")
    return value
