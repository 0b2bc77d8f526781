"""What changes of single weights would cost the model: a few windows through it and back, before a run has changed anything."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from math import isfinite
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from armor_recipes.calibration.inputs import Batch
from armor_recipes.calibration.statistics import InputSecondMoment
from armor_recipes.compute.threads import in_order as each_in_order
from armor_recipes.errors import NumericalError, PlanError
from armor_recipes.events import EvaluationProgressed, Observer, ignore_events, one_at_a_time
from armor_recipes.model.blocks import find_stacks
from armor_recipes.model.calls import LayerCall
from armor_recipes.model.experts import expert_of
from armor_recipes.model.hooks import feeding
from armor_recipes.model.linears import linears_that_share
from armor_recipes.model.outputs import main_output
from armor_recipes.model.padding import Reads, padding_of, reads_of
from armor_recipes.model.replay import feed
from armor_recipes.model.views import frozen, view
from armor_recipes.modifiers.base import ModuleShape, WithGradients
from armor_recipes.modifiers.kinds.pool import in_order
from armor_recipes.modifiers.seeding import module_seed
from armor_recipes.session.gradients import GradientPass, output_gradients

T = TypeVar("T")
#: Rows from which on an expert's cost is its own; below it is the mean of the layer's experts.
ENOUGH_ROWS = 256
#: The name of what is done, where progress is told.
MEASURING = "measure"
#: Dtype in which changes wait for their pass: all of them are there at once.
_KEPT = torch.bfloat16


@dataclass(frozen=True, slots=True)
class Trial:
    """A weight that is tried, and the change `(O, I)` of it that a modifier names, given the weight and its statistic.

    `gradients` says whether the statistic of its inputs comes in a `WithGradients`.
    """

    shape: ModuleShape
    change: Callable[[Tensor, InputSecondMoment | WithGradients], Tensor]
    gradients: bool = False

    @property
    def name(self) -> str:
        """The module's."""
        return self.shape.name


@torch.no_grad()
def change_costs(
    model: nn.Module,
    trials: Sequence[Trial],
    batches: Sequence[Batch],
    *,
    seed: int,
    observer: Observer = ignore_events,
) -> dict[str, float]:
    """What each change alone would cost, by module: KL(model ‖ changed model) in nats a token, to second order.

    With δ_t the gradient of the loss at a module's output row t, its input x_t and the change Δ it is ½ Σ_t (δ_tᵀ Δ x_t)² over the
    number of tokens, the loss being that of `output_gradients`: the Fisher information along Δ, without what two rows have in
    common. An expert that fewer than `ENOUGH_ROWS` rows reach counts as the mean of its layer's. A CPU runs several batches at
    once, each on one thread, and sums them in order. `observer` is told how many trials and passes are done.

    Raises NumericalError where a cost is not finite.
    """
    told, total, done = one_at_a_time(observer), len(trials) + 2 * len(batches), count(1)
    network = _Network.of(model, trials, batches, lambda: told(EvaluationProgressed(next(done), total, MEASURING)))
    changes = _changes(network, trials, seed)
    costs, rows = _costs(network, changes, seed)
    broken = next((name for name, cost in costs.items() if not isfinite(cost)), None)
    if broken is not None:
        raise NumericalError(
            f"what the loss feels of {broken} is not finite; check the model's weights, or set a wider `compute_dtype`"
        )
    return _with_peers(costs, rows)


@dataclass(frozen=True, slots=True)
class _Network:
    """The model and its windows: `users` has for each module all that have its weight, `doors` where gradients go back to.

    `tell` is called for each trial and each pass that is done.
    """

    model: nn.Module
    batches: Sequence[Batch]
    users: Mapping[str, Sequence[str]]
    doors: Sequence[str]
    tell: Callable[[], None]

    @classmethod
    def of(
        cls, model: nn.Module, trials: Sequence[Trial], batches: Sequence[Batch], tell: Callable[[], None]
    ) -> _Network:
        sharing, stacks = linears_that_share(model), find_stacks(model)
        users = {trial.name: sharing.get(trial.name, (trial.name,)) for trial in trials}
        outside = (stack.name for stack in stacks.outside if stack.name in users)
        return cls(model, batches, users, [*(stack.names[0] for stack in stacks.all), *outside], tell)

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return next(self.model.parameters()).device

    def of_each(self, function: Callable[[int], T]) -> Iterator[T]:
        """What a function gives for the number of each batch, in order."""
        for found in each_in_order(function, range(len(self.batches)), on_cpu=self.device.type == "cpu"):
            self.tell()
            yield found


def _changes(network: _Network, trials: Sequence[Trial], seed: int) -> dict[str, Tensor]:
    """The change of each module that a window reaches."""
    inputs = _statistics(network, trials)
    weighed = {trial.name: network.users[trial.name] for trial in trials if trial.gradients}
    felt = output_gradients(network.model, network.doors, weighed, network.batches, seed=seed) if weighed else None
    reached = [trial for trial in trials if inputs[trial.name].tokens]

    def change(trial: Trial, _: object) -> Tensor:
        statistic: InputSecondMoment | WithGradients = inputs[trial.name]
        if felt is not None and trial.gradients:
            g = felt.mean_square(trial.name, trial.shape.d_out).to(network.device)
            statistic = WithGradients(statistic, g)
        weight = network.model.get_parameter(f"{trial.name}.weight").detach()
        tried = trial.change(weight, statistic).to(_KEPT)
        network.tell()
        return tried

    found = in_order([partial(change, trial) for trial in reached], network.device)
    return {trial.name: tried for trial, tried in zip(reached, found, strict=True)}


def _statistics(network: _Network, trials: Sequence[Trial]) -> dict[str, InputSecondMoment]:
    """Of each module's inputs."""
    totals = {trial.name: InputSecondMoment(trial.name, trial.shape.d_in) for trial in trials}
    copied = [user for users in network.users.values() for user in users]

    def run(index: int) -> dict[str, InputSecondMoment]:
        batch = network.batches[index]
        found = {trial.name: InputSecondMoment(trial.name, trial.shape.d_in) for trial in trials}
        seen = view(network.model, {}, copied=copied)
        for name, statistic in found.items():
            for user in network.users[name]:
                hook = feeding(statistic, name, _pieces(batch, reads_of(network.model, user, batch)))
                seen.get_submodule(user).register_forward_pre_hook(hook, with_kwargs=True)
        with torch.no_grad():
            output = feed(seen, batch)
        if not main_output(output).logits:
            raise PlanError(
                f"it is measured by the model's logits, and a {type(network.model).__name__} gives none: give a value"
            )
        return found

    for found in network.of_each(run):
        for name, statistic in found.items():
            totals[name].merge(statistic)
    return totals


def _costs(network: _Network, changes: Mapping[str, Tensor], seed: int) -> tuple[dict[str, float], dict[str, int]]:
    """Cost and number of rows of each module; no cost where no row reaches it."""
    users = {name: network.users[name] for name in changes}

    def run(index: int) -> tuple[int, dict[str, float], dict[str, int]]:
        generator = torch.Generator().manual_seed(module_seed(seed, f"labels of batch {index}"))
        found = _CostPass(network.model, network.doors, users, network.batches[index], generator, changes)
        return found.tokens, found.costs, found.rows

    sums, rows, tokens = dict.fromkeys(network.users, 0.0), dict.fromkeys(network.users, 0), 0
    with frozen(network.model):
        for counted, costs, reached in network.of_each(run):
            tokens += counted
            for name in users:
                sums[name] += costs.get(name, 0.0)
                rows[name] += reached[name]
    return {name: 0.5 * total / max(tokens, 1) for name, total in sums.items()}, rows


def _pieces(batch: Batch, reads: Reads) -> Any:
    return lambda x: padding_of(batch, reads, LayerCall(x, (), {})).pieces(x)


class _CostPass(GradientPass):
    """One batch forward and back: Σ_t (δ_tᵀ Δ x_t)² of each module."""

    def __init__(
        self,
        model: nn.Module,
        doors: Sequence[str],
        names: Mapping[str, Sequence[str]],
        batch: Batch,
        generator: torch.Generator,
        changes: Mapping[str, Tensor],
    ) -> None:
        self.costs: dict[str, float] = {}
        self._changes = changes
        super().__init__(model, doors, names, batch, generator)

    def watch(self, name: str, reads: Reads) -> Any:
        """A forward hook that weighs what the change would add to the output by the gradient there."""

        def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            self.rows[name] += sum(
                piece.numel() // piece.shape[-1] for piece in self.padding(reads, output).pieces(output)
            )
            if not output.requires_grad:
                return
            with torch.no_grad():
                added = nn.functional.linear(args[0].detach(), self._changes[name].to(output.dtype))
            output.register_hook(lambda gradient: self._weigh(name, gradient, added))

        return hook

    def _weigh(self, name: str, gradient: Tensor, added: Tensor) -> None:
        felt = (gradient.detach().float() * added.float()).sum(-1, dtype=torch.float64)
        self.costs[name] = self.costs.get(name, 0.0) + float(felt.square().sum())


def _with_peers(costs: Mapping[str, float], rows: Mapping[str, int]) -> dict[str, float]:
    """The costs, those of experts that few rows reach replaced by the mean of the same module in all experts of the layer."""
    peers: dict[tuple[str, str], list[str]] = {}
    for name in costs:
        expert = expert_of(name)
        if expert is not None:
            peers.setdefault((expert.layer, expert.part), []).append(name)
    found = dict(costs)
    for names in peers.values():
        mean = sum(costs[name] for name in names) / len(names)
        found |= {name: mean for name in names if rows[name] < ENOUGH_ROWS}
    return found
