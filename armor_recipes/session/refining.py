"""Build what a refiner trains: a decoder layer or the whole model with its factors as parameters, and the dense targets."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import ArmorError, CheckpointError
from armor_recipes.modifiers.base import Refiner, RefineTask, UnitOutput
from armor_recipes.recipe import ModifierEntry
from armor_recipes.session.capture import Stream, hidden_states
from armor_recipes.session.layers import DecoderLayers
from armor_recipes.session.views import frozen, view
from armor_recipes.solver import TrainableFactors, TrainableLinear


@dataclass(frozen=True, slots=True)
class RefineResult:
    """One unit that was trained: held-out losses, the first before training, steps taken and gradients clipped.

    `unit` is a decoder layer's name, or `model`. `compute_dtype` is that of its forward and backward passes. `vectors` counts the
    numbers in norms that changed.
    """

    modifier: str
    unit: str
    losses: tuple[float, ...]
    steps: int
    clipped: int
    stop_reason: str
    compute_dtype: str
    modules: int
    vectors: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Refined:
    """What a unit's training gives: the result, the packed factors by module, and the norms' weights that changed by name."""

    result: RefineResult
    factors: Mapping[str, PackedLinear]
    vectors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class RefineJob:
    """A refiner's entry with the packed factors of the modules it takes, by full name; `dtype` is what they are rounded to.

    `sharing` names for each module the first of those that share its B, often itself.
    """

    entry: ModifierEntry
    refiner: Refiner[Any]
    packed: Mapping[str, PackedLinear]
    sharing: Mapping[str, str]
    dtype: torch.dtype
    progress: Callable[[int, int, float], None]


@dataclass(frozen=True, slots=True)
class Teaching:
    """What the whole model is trained on: token ids `(B, L)` batch by batch, and the dense model's parameters by name, as far as
    the model's own have changed since.
    """

    batches: Sequence[Tensor]
    dense: Mapping[str, Tensor]


def refine_layer(
    job: RefineJob, layers: DecoderLayers, index: int, *, inputs: Stream, targets: Sequence[Tensor]
) -> Refined:
    """Train one decoder layer on the compressed stream against the dense layer's outputs `(B, L, H)`, batch by batch."""
    layer, prefix = layers.modules[index], layers.names[index] + "."
    factors, vectors = _trainables(job, layer, prefix)

    def forward(batch: int) -> UnitOutput:
        return UnitOutput(inputs.call(index, batch).run(_student(layer, prefix, factors, vectors)))

    task = RefineTask(factors, vectors, len(targets), forward, lambda batch: UnitOutput(targets[batch]))
    tokens = sum(t.shape[0] * t.shape[1] for t in targets)
    return _refine(job, task, layers.names[index], layer, tokens=tokens, compute=next(layer.parameters()).dtype)


def refine_model(job: RefineJob, model: nn.Module, layers: DecoderLayers, teaching: Teaching) -> Refined:
    """Train the whole model against the logits of the dense one and, where the refiner asks for them, hidden states on the way.

    The dense model runs along: a view of the model with the dense parameters in the place of its own. Both run in the refiner's
    compute dtype; factors, norms' weights, their gradients and Adam's moments are float32.
    """
    compute = job.refiner.compute_dtype(next(model.parameters()))
    products = torch.bfloat16 if compute == torch.bfloat16 else torch.float32
    factors, vectors = _trainables(job, model, "", products)
    tapped = [layers.names[index] for index in job.refiner.hidden_layers(len(layers.names))]
    base = _converted(model, compute, but={f"{name}.weight" for name in factors})

    def run(network: nn.Module, batch: int) -> UnitOutput:
        hidden = [_tap(network.get_submodule(name)) for name in tapped]
        logits: Tensor = network(input_ids=teaching.batches[batch], use_cache=False).logits
        return UnitOutput(logits, tuple(taken[0] for taken in hidden))

    def forward(batch: int) -> UnitOutput:
        return run(_student(base, "", factors, vectors, copied=tapped), batch)

    def target(batch: int) -> UnitOutput:
        return run(dense_view(base, teaching.dense, copied=tapped), batch)

    task = RefineTask(factors, vectors, len(teaching.batches), forward, target)
    tokens = sum(ids.numel() for ids in teaching.batches)
    return _refine(job, task, "model", model, tokens=tokens, compute=compute)


def _converted(model: nn.Module, dtype: torch.dtype, *, but: Collection[str]) -> nn.Module:
    """A view of the model with its floating-point parameters in another dtype; those that it shares stay shared.

    Parameters named in `but` stay as they are: whoever uses the view puts others in their place.
    """
    own = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in but}
    changed = {id(p): p for p in own.values() if p.is_floating_point() and p.dtype != dtype}
    new = {key: nn.Parameter(p.detach().to(dtype), requires_grad=False) for key, p in changed.items()}
    return view(model, {name: new[id(p)] for name, p in own.items() if id(p) in new}) if new else model


def _refine(
    job: RefineJob, task: RefineTask, unit: str, module: nn.Module, *, tokens: int, compute: torch.dtype
) -> Refined:
    started = time.perf_counter()
    own = [module.get_parameter(_within(f"{name}.weight", unit)) for name in task.factors]
    try:
        with frozen(module), _let_go(own):
            outcome = job.refiner.refine(task, job.progress)
        packed = {name: _packed(name, factors, job.dtype) for name, factors in task.factors.items()}
    except ArmorError as error:
        raise type(error)(f"{job.entry.where}: {job.entry.name}: {unit}: {error}") from error
    changed = {
        name: value.detach()
        for name, value in task.vectors.items()
        if not torch.equal(value, module.get_parameter(_within(name, unit)))
    }
    result = RefineResult(
        modifier=job.entry.key,
        unit=unit,
        losses=outcome.losses,
        steps=outcome.steps,
        clipped=outcome.clipped,
        stop_reason=outcome.stop_reason,
        compute_dtype=str(compute).removeprefix("torch."),
        modules=len(task.factors),
        vectors=sum(value.numel() for value in changed.values()),
        tokens=tokens,
        seconds=time.perf_counter() - started,
    )
    return Refined(result, packed, changed)


def _within(name: str, unit: str) -> str:
    return name if unit == "model" else name.removeprefix(f"{unit}.")


def _packed(name: str, factors: TrainableFactors, dtype: torch.dtype) -> PackedLinear:
    """Rounded and packed. Raises CheckpointError with the module's name where a value overflows `dtype`."""
    try:
        return PackedLinear.from_factorization(factors, dtype)
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}; lower `learning_rate`") from error


def _trainables(
    job: RefineJob, module: nn.Module, prefix: str, products: torch.dtype = torch.float32
) -> tuple[dict[str, TrainableFactors], dict[str, nn.Parameter]]:
    """Factors of the modules, and copies of the weights of the unit's norms. A B that modules share stays one.

    A norm is a module without children whose parameters are all vectors: no list of classes knows every model's.
    """
    factors = {}
    shared: dict[str, nn.Parameter] = {}
    for name, packed in job.packed.items():
        core, mask = packed.unpack(name=name)
        factors[name] = TrainableFactors(packed.a, core, mask, packed.b, products)
        factors[name].b = shared.setdefault(job.sharing[name], factors[name].b)
    vectors = {
        f"{prefix}{owner}.{name}": nn.Parameter(parameter.detach().float().clone())
        for owner, part in module.named_modules()
        if not any(True for _ in part.children()) and all(parameter.ndim == 1 for parameter in part.parameters())
        for name, parameter in part.named_parameters()
    }
    return factors, vectors


def _student(
    module: nn.Module,
    prefix: str,
    factors: Mapping[str, TrainableFactors],
    vectors: Mapping[str, nn.Parameter],
    copied: Sequence[str] = (),
) -> nn.Module:
    """A view of the module in which factors stand for its linear layers, and the vectors for its own.

    Modules in `copied` are the view's own even where nothing inside is replaced.
    """
    own: dict[str, nn.Module | Tensor] = {}
    for name, trained in factors.items():
        linear = module.get_submodule(name.removeprefix(prefix))
        assert isinstance(linear, nn.Linear)
        own[name.removeprefix(prefix)] = TrainableLinear(trained, linear.bias)
    for name, vector in vectors.items():
        inner = name.removeprefix(prefix)
        own[inner] = vector.to(module.get_parameter(inner).dtype)
    return view(module, own, copied=copied)


def _tap(layer: nn.Module) -> list[Tensor]:
    """A list that the layer of a view puts its hidden states into."""
    taken: list[Tensor] = []
    layer.register_forward_hook(lambda _, __, output: taken.append(hidden_states(output)))
    return taken


@contextmanager
def _let_go(weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """Give the memory of these weights back: the factors stand for them, and make them anew in the end.

    Afterwards they have their shape again and no meaning.
    """
    shapes = [weight.shape for weight in weights]
    try:
        for weight in weights:
            weight.data = weight.data.new_empty(0)
        yield
    finally:
        for weight, shape in zip(weights, shapes, strict=True):
            weight.data = weight.data.new_zeros(shape)


def dense_view(model: nn.Module, dense: Mapping[str, Tensor], copied: Sequence[str] = ()) -> nn.Module:
    """The model with other parameters, by name, in the place of its own, which may hold anything.

    Weights of linear layers are kept in the dtype that they come in and widened when they are used.
    """
    parts: dict[str, nn.Module | Tensor] = {}
    for name, value in dense.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(module, nn.Linear) and leaf == "weight":
            parts[owner] = _WidenedLinear(value, module.bias)
        else:
            parts[name] = value.to(model.get_parameter(name).dtype)
    return view(model, parts, copied=copied)


class _WidenedLinear(nn.Module):
    """A linear layer whose weight `(O, I)` may be of a narrower dtype than its input."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = bias
        self.out_features, self.in_features = weight.shape

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's name
        return nn.functional.linear(input, self.weight.to(input.dtype), self.bias)
