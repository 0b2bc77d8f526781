"""What the model's loss feels of each module's outputs: one forward and backward pass over the calibration windows."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.calibration.inputs import Batch
from armor_recipes.compute.threads import in_order
from armor_recipes.errors import NumericalError
from armor_recipes.events import PhaseStarted
from armor_recipes.model.calls import LayerCall
from armor_recipes.model.experts import expert_of
from armor_recipes.model.padding import Padding, Reads, padding_of, reads_of, written_or_read
from armor_recipes.model.replay import feed
from armor_recipes.model.views import frozen, view
from armor_recipes.modifiers.kinds.contract import BlockContext, Row, Share, located
from armor_recipes.modifiers.kinds.experts import minimum_tokens
from armor_recipes.modifiers.seeding import module_seed
from armor_recipes.recipe.schema import CalibrationSpec, MoeSpec

#: Tokens whose probabilities are taken at once: the vocabulary is large.
_ROWS = 64


@dataclass(frozen=True, slots=True)
class OutputGradients:
    """By module: squared gradients summed over output rows, float64 `(O,)`, where any reached it; and how many rows there were."""

    sums: Mapping[str, Tensor]
    rows: Mapping[str, int]

    def mean_square(self, name: str, outputs: int) -> Tensor:
        """The module's g, float32 `(outputs,)`: zeros where nothing of it reaches the logits.

        Raises NumericalError where one is not finite, or no token reaches the module.
        """
        if not self.rows[name]:
            raise NumericalError(f"no calibration token reached {name}; add it to `ignore`, or calibrate on other text")
        total = self.sums.get(name)
        if total is None:
            return torch.zeros(outputs)
        mean = (total / self.rows[name]).float()
        if not bool(mean.isfinite().all()):
            raise NumericalError(
                f"the gradients at the outputs of {name} are not finite; check the model's weights, or set a wider `compute_dtype`"
            )
        return mean

    def of_enough(self, moe: MoeSpec) -> OutputGradients:
        """The same, but of experts that fewer rows than the minimum reached what the same module of all experts of the layer has.

        Where the recipe says `below: error` all stay as they are: the statistics of inputs say so.
        """
        least = minimum_tokens(moe)
        poor = [name for name, rows in self.rows.items() if rows < least and expert_of(name)]
        if moe.below == "error" or not poor:
            return self
        peers: dict[tuple[str, str], list[str]] = {}
        for name, expert in ((name, expert_of(name)) for name in self.rows):
            if expert is not None:
                peers.setdefault((expert.layer, expert.part), []).append(name)
        sums, rows = dict(self.sums), dict(self.rows)
        for names in peers.values():
            shared = [self.sums[name] for name in names if name in self.sums]
            for name in (name for name in names if self.rows[name] < least):
                rows[name] = sum(self.rows[other] for other in names)
                sums |= {name: torch.stack(shared).sum(0)} if shared else {}
        return OutputGradients(sums, rows)


def stage_gradients(shares: Sequence[Share], rows: Sequence[Row], context: BlockContext) -> dict[str, Tensor]:
    """Each module's g `(O,)`, of those whose modifiers ask for it: on their calibration, from the model as the stage finds it."""
    wanted: dict[tuple[CalibrationSpec, int], dict[str, Share]] = {}
    for share in (share for share in shares if share.modifier.needs.gradients):
        config, key = share.entry.config, share.entry.key
        names = [name for row in rows if row.modifier == key for name in row.takes]
        if config.calibration is not None:
            wanted.setdefault((config.calibration, config.seed), {}).update(dict.fromkeys(names, share))
    gradients = {}
    for (spec, seed), takers in wanted.items():
        context.observer(PhaseStarted("gradients of the outputs"))
        users = {name: context.users(name) for name in takers}
        found = output_gradients(context.model, _doors(context, takers), users, context.batches(spec), seed=seed)
        found = found.of_enough(context.moe)
        for name, share in takers.items():
            weight = context.weights.read(f"{name}.weight")
            with located(share.entry, name):
                gradients[name] = found.mean_square(name, len(weight)).to(weight.device)
    return gradients


def _doors(context: BlockContext, names: Collection[str]) -> list[str]:
    """The first block of each list, and the named modules outside of them: gradients go back to there at least."""
    reached = set(context.blocks)
    lists = [stack.names for stack in context.stacks.all if not reached.isdisjoint(stack.indices)]
    return [*(found[0] for found in lists), *(stack.name for stack in context.stacks.outside if stack.name in names)]


def output_gradients(
    model: nn.Module,
    doors: Sequence[str],
    names: Mapping[str, Sequence[str]],
    batches: Sequence[Batch],
    *,
    seed: int,
) -> OutputGradients:
    """What the loss's gradient is at each of the named modules' outputs, by one pass over the batches and back.

    `names` gives for each module all that have its weight: what is at their outputs is added up.
    Gradients go back to the inputs of the modules `doors`, which lie before all that are named.
    The loss is the cross-entropy of each token's prediction, summed over a batch, of labels that are drawn from the
    prediction itself: the diagonal of the Fisher information at the outputs. Draws depend on the seed and the batch's index
    alone. A CPU runs several batches at once, each on one thread, and sums them in order.
    """
    on_cpu = next(model.parameters()).device.type == "cpu"
    sums: dict[str, Tensor] = {}
    rows = dict.fromkeys(names, 0)

    def run(index: int) -> tuple[dict[str, int], dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(module_seed(seed, f"labels of batch {index}"))
        found = GradientPass(model, doors, names, batches[index], generator)
        return found.rows, found.sums

    with frozen(model):
        for counts, found in in_order(run, range(len(batches)), on_cpu=on_cpu):
            for name in names:
                rows[name] += counts[name]
                if name in found:
                    sums[name] = sums[name] + found[name] if name in sums else found[name]
    return OutputGradients(sums, rows)


class GradientPass:
    """One batch forward and back through a view of the model with hooks of its own: squared gradients summed over rows.

    `tokens` are the rows of logits that count.
    """

    def __init__(
        self,
        model: nn.Module,
        doors: Sequence[str],
        names: Mapping[str, Sequence[str]],
        batch: Batch,
        generator: torch.Generator,
    ) -> None:
        self.sums: dict[str, Tensor] = {}
        self.rows = dict.fromkeys(names, 0)
        self.tokens = 0
        self._starts: list[Tensor] = []
        self._batch = batch
        network = view(model, {}, copied=[*doors, *(user for users in names.values() for user in users)])
        for door in doors:
            network.get_submodule(door).register_forward_pre_hook(self._enter, with_kwargs=True)
        for name, users in names.items():
            for user in users:  # a module that stands at several places is one for each of them in the view
                network.get_submodule(user).register_forward_hook(self.watch(name, reads_of(model, user, batch)))
        with torch.enable_grad():
            logits: Tensor = feed(network, batch).logits
            gradient = self._drawn(logits.detach(), generator)
            torch.autograd.grad(logits, self._starts, gradient, allow_unused=True)

    def _drawn(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """The gradient at the logits `(B, L, V)`: of drawn labels, at tokens that count."""
        mask = self.padding(written_or_read(self._batch), logits).mask_of(logits)
        self.tokens = logits.flatten(0, -2).shape[0] if mask is None else int(mask.sum())
        if mask is None:
            return _drawn(logits, generator)
        found = torch.zeros_like(logits)
        found[mask] = _drawn(logits[mask], generator)
        return found

    def padding(self, reads: Reads, x: Tensor) -> Padding:
        """Of the batch, at activations `(B, L, …)`."""
        return padding_of(self._batch, reads, LayerCall(x, (), {}))

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Gradients go back to here: nothing below needs one."""
        hidden = LayerCall.of(args, kwargs).hidden
        if not hidden.requires_grad:
            self._starts.append(hidden.requires_grad_())

    def watch(self, name: str, reads: Reads) -> Any:
        """A forward hook for the named module, or another that has its weight."""

        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            pieces = self.padding(reads, output).pieces(output)
            self.rows[name] += sum(piece.numel() // piece.shape[-1] for piece in pieces)
            if output.requires_grad:  # else nothing that the layers make of their inputs reaches it
                output.register_hook(lambda gradient: self._add(name, gradient))

        return hook

    def _add(self, name: str, gradient: Tensor) -> None:
        share = gradient.detach().flatten(0, -2).float().square().sum(0, dtype=torch.float64)
        self.sums[name] = self.sums[name] + share if name in self.sums else share


def _drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Gradient of the cross-entropy of drawn labels at the logits `(B, L, V)`: the probabilities, less one at the label."""
    flat = logits.flatten(0, -2)
    numbers = torch.rand(len(flat), 1, generator=generator, dtype=torch.float64).to(flat.device)
    found = torch.empty_like(flat)
    for rows, drawn, out in zip(flat.split(_ROWS), numbers.split(_ROWS), found.split(_ROWS), strict=True):
        probabilities = rows.float().softmax(-1)
        reached = probabilities.double().cumsum(-1)
        label = (reached < drawn * reached[:, -1:]).sum(-1, keepdim=True).clamp(max=rows.shape[-1] - 1)
        out.copy_(probabilities.scatter_add(-1, label, torch.full_like(probabilities[:, :1], -1.0)))
    return found.view_as(logits)
