"""`Refiner`: trains the factors that modifiers before it made, of a block or of the whole model, against the dense one."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from armor_recipes.calibration.inputs import TOKENS, Batch, leading, some_of
from armor_recipes.checkpoint.packing import PackedLinear
from armor_recipes.errors import CheckpointError, PlanError, UnfitError
from armor_recipes.events import UnitRefined
from armor_recipes.model.calls import LayerCall, hidden_states
from armor_recipes.model.outputs import MainOutput, main_output
from armor_recipes.model.padding import kept_of, reads_of, written_or_read
from armor_recipes.model.replay import feed, parameters_of
from armor_recipes.model.views import dense_view, frozen, shared_names, view
from armor_recipes.modifiers.base import AnyModifier, C, Estimate, ModuleShape, Needs, SolveProgress
from armor_recipes.modifiers.kinds.changes import Changes, ModuleResult, StepResult, loaded_weight
from armor_recipes.modifiers.kinds.contract import (
    BlockContext,
    Kind,
    Planned,
    Planning,
    Row,
    Share,
    Snapshot,
    Unit,
    calibration_tokens,
    entry_name,
    located,
)
from armor_recipes.modifiers.kinds.experts import left_alone
from armor_recipes.modifiers.kinds.module import GIVEN, ModulePlan
from armor_recipes.solver import TrainableFactors, TrainableLinear

_ALL = slice(None)
#: The argument by which transformers' causal models are told for which tokens they are to compute logits.
_KEEP = "logits_to_keep"
#: Tokens that a CPU computes together at least, where a batch has as many. A pass over fewer costs mostly what does not depend on
#: their number: on the embedded model, one of 64 tokens half of its time, one of 512 a tenth.
_PART_TOKENS = 512


@dataclass(frozen=True, slots=True)
class RefinePlan(Row):
    """What one refiner will train at once: the factors of `modules`, in block `layer`, or in the whole model (None)."""

    section: ClassVar[str] = "refinements"

    modifier: str
    stage: str
    unit: str
    layer: int | None
    modules: tuple[str, ...]
    tokens: int
    flops: float
    peak_bytes: int
    parts: int
    part_bytes: int
    logit_stride: int = 1

    @property
    def touches(self) -> tuple[str, ...]:
        """The modules whose factors are trained."""
        return self.modules

    @property
    def side_by_side(self) -> tuple[int, int]:
        """Parts of batches."""
        return self.parts, self.part_bytes


@dataclass(frozen=True, slots=True)
class RefineResult(StepResult):
    """One unit that was trained: held-out losses, the first before training, steps taken and gradients clipped.

    `unit` is a block's name, or `model`. `compute_dtype` is that of its forward and backward passes. `norm_values` counts the
    numbers in norms that changed, `whole_batches` the batches whose windows the block does not take one by one. `outputs` names
    what of a model's output was compared where that is not its logits, and `logit_stride` n that those of every n-th token were.
    """

    section: ClassVar[str] = "refinements"

    modifier: str
    unit: str
    modules: int
    norm_values: int
    tokens: int
    losses: tuple[float, ...]
    steps: int
    clipped: int
    whole_batches: int
    stop_reason: str
    compute_dtype: str
    seconds: float
    outputs: str = ""
    logit_stride: int = 1

    def record(self) -> dict[str, Any]:
        """As plain data; `outputs` and `logit_stride` only where they are not all logits."""
        usual = {"outputs": "", "logit_stride": 1}
        return {key: value for key, value in StepResult.record(self).items() if usual.get(key) != value}


@dataclass(frozen=True, slots=True)
class UnitLeftOut(StepResult):
    """A unit in which there was nothing to train, since all of its experts saw too few tokens and were skipped."""

    section: ClassVar[str] = "refinements_left_out"

    modifier: str
    unit: str
    reason: str
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class RefineUnit:
    """What a refiner trains at once, as the plan knows it: the modules, the parameters around them, and the tokens it sees.

    Attributes:
        modules: the factorised modules.
        factor_values: numbers that are trained: A, the kept values of S, and B of all of them.
        parameters: numbers of the layer or model that a forward pass reads.
        width: numbers that it gives for a token.
        tokens: calibration tokens.
        batch_tokens: tokens of one batch.
        batch_parts: parts of a batch that a CPU computes side by side.
        head: numbers of the matrix that gives a model's logits, among `parameters`; 0 for a block.
    """

    modules: tuple[ModuleShape, ...]
    factor_values: int
    parameters: int
    width: int
    tokens: int
    batch_tokens: int
    batch_parts: int
    head: int = 0


@dataclass(frozen=True, slots=True)
class UnitOutput:
    """What a unit makes of one batch: the layer's hidden states `(B, L, H)` or the model's logits `(B, L, V)`; and for a model
    the outputs `(B, L, H)` of the layers that its refiner asked for. B is less where it is of some windows of the batch; of a batch
    with padding they are `(T, …)`, of the tokens that count.

    `logits` is False of a model without: then the output is its embeddings or hidden states `(…, H)`, others of them first in
    `hidden`.
    """

    output: Tensor
    hidden: tuple[Tensor, ...] = ()
    logits: bool = True


class UnitPass(Protocol):
    """A unit's output for a batch, or for some of its windows alone. Threads may call it at once."""

    def __call__(self, batch: int, windows: slice = ..., /) -> UnitOutput:
        """The output; of all windows unless some are named."""


@dataclass(frozen=True, slots=True)
class RefineTask:
    """One unit to train. Everything is in memory already, on the model's device.

    Attributes:
        factors: what is trained, by the module's full name; modules that share a B hold the very same parameter.
        vectors: weights of norms of the unit by full name, trained on request.
        batches: how many calibration batches there are.
        forward: the unit's output with the present factors and vectors, differentiable.
        target: the dense unit's output.
        parts: for each batch the windows that a CPU computes together, part by part; none where the batch goes as a whole only,
            as all do where nothing is named.
        snapshot: keeps the state of the training, where a run can be taken up again.
    """

    factors: Mapping[str, TrainableFactors]
    vectors: Mapping[str, nn.Parameter]
    batches: int
    forward: UnitPass
    target: UnitPass
    parts: Sequence[Sequence[slice]] = ()
    snapshot: Snapshot | None = None


@dataclass(frozen=True, slots=True)
class RefineOutcome:
    """Held-out losses, the first before training; the factors and vectors are left at the best of them.

    `clipped` counts gradients of batches that were shortened.
    """

    losses: tuple[float, ...]
    steps: int
    stop_reason: str
    clipped: int = 0


class Refining(Kind):
    """Trains one block, or the model, with its factors as parameters."""

    chooses = True

    def plan(self, planning: Planning, modifier: Refiner[Any]) -> Planned:
        """One unit a block, or one for the model, of the targeted modules that this stage factorised before."""
        wanted = set(planning.names)
        made: list[ModulePlan] = [row for row in planning.made(ModulePlan.section) if row.name in wanted]
        refused = {row.name: error for row in made if (error := _unfit(row, modifier)) is not None}
        problems, skipped = planning.unfit(refused)
        stage = planning.entry.stage
        taken = [
            row for row in made if row.stage in (stage, "") and row.stored_as == "packed" and row.name not in refused
        ]
        if planning.names and not taken and not refused:
            raise PlanError(
                f"no modifier before it in {stage} makes 2:4 factors for a module of its targets; put it after an "
                "ARMORModifier of the same stage"
            )
        by_block: dict[int | None, list[ModulePlan]] = {}
        for row in taken:
            by_block.setdefault(row.layer if modifier.scope == "layer" else None, []).append(row)
        units = sorted(by_block.items(), key=lambda item: item[0] or 0)
        rows = tuple(_plan_unit(planning, modifier, index, found) for index, found in units)
        return Planned(rows, problems, skipped)

    def run(self, unit: Unit, context: BlockContext) -> Changes:
        """Train, and round what was trained as it is stored."""
        (share,) = unit.shares
        (row,) = share.rows
        job = _Job.of(unit.key, share, row, context)
        if not job.packed:
            context.progress(row)
            return Changes(unit.key, results=(UnitLeftOut(share.entry.key, row.unit, "its modules were left dense"),))
        trained = _train_model(job) if context.block is None else _train_block(job)
        changes = _rounded(trained, unit.key, context)
        result, done = trained.result, context.progress(row)
        context.observer(
            UnitRefined(result.unit, result.losses[0], min(result.losses), result.steps, result.seconds, done)
        )
        return changes


class Refiner(AnyModifier[C]):
    """Trains factors that an earlier modifier of the same stage made.

    Class attribute `scope`: `layer` runs after the layer's other modifiers, on the outputs of the layer; `model` runs at the
    end of the stage, on logits (or what else the model gives).
    """

    kind: ClassVar[Kind] = Refining()
    scope: ClassVar[Literal["layer", "model"]]
    category: ClassVar[str] = "refine"

    @classmethod
    def lack(cls) -> str:
        """A scope."""
        scope = getattr(cls, "scope", None)
        return "" if scope in ("layer", "model") else f"its scope must be 'layer' or 'model' (value {scope!r})"

    @property
    def trains_core(self) -> bool:
        """Whether it trains the kept values of S, too, which a quantised core does not allow."""
        return False

    @property
    def needs(self) -> Needs:
        """Factors; and what the dense block gives on the same tokens, or the dense model as a whole at the end of the stage."""
        if self.scope == "model":
            return Needs(when="after", factors=True, dense="model")
        return Needs(streams=("compressed", "dense"), factors=True, dense="outputs")

    def hidden_layers(self, total: int) -> tuple[int, ...]:  # noqa: ARG002 - for those that override it
        """Of a model with so many layers, those whose hidden states the loss compares (scope `model`)."""
        return ()

    def logit_stride(self, unit: RefineUnit) -> int:  # noqa: ARG002 - for those that override it
        """n, where the loss compares the logits of every n-th token (scope `model`)."""
        return 1

    @property
    def epochs(self) -> int:
        """Passes over the calibration at most, for the estimate of time."""
        return 1

    def compute_dtype(self, parameter: Tensor) -> torch.dtype:
        """Of the passes (scope `model`), given a parameter of the model."""
        return parameter.dtype

    @abstractmethod
    def plan(self, unit: RefineUnit) -> Estimate:
        """Estimate the cost of one unit; bytes stay what they were. Raises PlanError."""

    @abstractmethod
    def refine(self, task: RefineTask, on_progress: SolveProgress | None) -> RefineOutcome:
        """Train the task's factors in place. Raises NumericalError."""


def _unfit(row: ModulePlan, modifier: Refiner[Any]) -> UnfitError | None:
    """Why factors that were made before cannot be trained; None where they can."""
    if row.core != "float" and modifier.trains_core:
        where = "in the model" if row.modifier == GIVEN else f"by {entry_name(row.modifier)} before it"
        return UnfitError(
            f"the core of {row.name} is {row.core} {where}, whose numbers stay as they are, and `core: true` would train them",
            "leave `core` out, which trains A and B around it, or put the refiner before what quantises",
        )
    if row.uses:
        return UnfitError(
            f"the weight of {row.name} is that of {', '.join(row.uses)}, too, and factors are trained at one place",
            f"add {row.name!r} to `ignore`",
        )
    return None


def _plan_unit(planning: Planning, refiner: Refiner[Any], index: int | None, found: Sequence[ModulePlan]) -> RefinePlan:
    spec = planning.entry.config.calibration
    assert spec is not None
    part = planning.model if index is None else planning.stacks.block(index)
    width = planning.facts.vocab_size if index is None else planning.facts.hidden_size
    unit = RefineUnit(
        modules=tuple(row.shape for row in found),
        factor_values=sum(row.factor_bytes // row.itemsize + row.d_out * row.d_in // 2 for row in found),
        parameters=sum(p.numel() for p in part.parameters()),
        width=width or 0,
        tokens=calibration_tokens(spec),
        batch_tokens=spec.batch_size * spec.sequence_length,
        batch_parts=len(_parts_of(spec.batch_size, spec.sequence_length)),
        head=_head(planning) if index is None else 0,
    )
    cost = refiner.plan(unit)
    return RefinePlan(
        modifier=planning.entry.key,
        stage=planning.entry.stage,
        unit="model" if index is None else planning.stacks.block_name(index),
        layer=index,
        modules=tuple(row.name for row in found),
        tokens=unit.tokens,
        flops=cost.flops,
        peak_bytes=cost.peak_bytes,
        parts=cost.parts,
        part_bytes=cost.part_bytes,
        logit_stride=refiner.logit_stride(unit),
    )


def _head(planning: Planning) -> int:
    """Numbers of the matrix that gives logits of a vocabulary; 0 where there is none."""
    head = getattr(planning.model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    return weight.numel() if isinstance(weight, Tensor) else 0


@dataclass(frozen=True, slots=True)
class _Job:
    """A refiner with the packed factors of the modules that it takes, by full name, and the block or model around them.

    `key` is the step's.
    """

    share: Share
    row: RefinePlan
    refiner: Refiner[Any]
    packed: Mapping[str, PackedLinear]
    key: str
    module: nn.Module
    context: BlockContext

    @classmethod
    def of(cls, key: str, share: Share, row: RefinePlan, context: BlockContext) -> _Job:
        refiner: Any = share.modifier
        without = left_alone(context.state)
        packed = {name: context.state.factors[name] for name in row.modules if name not in without}
        module = context.model if context.block is None else context.module
        return cls(share, row, refiner, packed, key, module, context)

    @property
    def prefix(self) -> str:
        """What full names begin with that the module's own do not."""
        return "" if self.context.block is None else f"{self.row.unit}."


@dataclass(frozen=True, slots=True)
class _Trained:
    """What a unit's training gives: the result, the packed factors by module, and the norms' weights that changed by name."""

    result: RefineResult
    factors: Mapping[str, PackedLinear]
    vectors: Mapping[str, Tensor]


def _train_block(job: _Job) -> _Trained:
    """Train one block on the compressed stream against the dense block's outputs `(B, L, H)`, batch by batch.

    Where the model calls the block several times, on what all calls of a batch give.
    """
    context, block = job.context, job.module
    stream, dense = context.stream(job.share, "compressed"), context.stream(job.share, "dense")
    found = zip(*(ask(context.index) for ask in (stream.uses, dense.outputs, stream.paddings)), strict=True)
    reached = [one for one in found if one[0]]  # a batch need not reach every block
    calls, targets, paddings = ([one[place] for one in reached] for place in range(3))
    student = Student.of(block, job.prefix, *_trainables(job, block, job.prefix))

    def joined(batch: int, outputs: Sequence[Tensor], windows: slice) -> UnitOutput:
        kept = [paddings[batch].kept(output, windows) for output in outputs]
        return UnitOutput(kept[0] if len(kept) == 1 else torch.cat(kept))

    def forward(batch: int, windows: slice = _ALL) -> UnitOutput:
        module = student.module()
        return joined(batch, [call.part(windows).run(module) for call in calls[batch]], windows)

    def target(batch: int, windows: slice = _ALL) -> UnitOutput:
        return joined(batch, [output[windows] for output in targets[batch]], windows)

    parts = _parts([outputs[0] for outputs in targets])
    parts = _tried(block, calls, parts) if parts else []
    task = RefineTask(student.factors, student.vectors, len(targets), forward, target, parts)
    tokens = sum(target(batch).output.shape[:-1].numel() for batch in range(len(targets)))
    return _train(job, task, tokens=tokens, compute=next(block.parameters()).dtype)


def _parts(batches: Sequence[Tensor]) -> list[list[slice]]:
    """Parts of batches `(B, L, ...)`; none on a GPU, which takes batches as a whole."""
    return [_parts_of(*batch.shape[:2]) for batch in batches] if batches[0].device.type == "cpu" else []


def _parts_of(windows: int, tokens: int) -> list[slice]:
    """Parts of a batch, each of as few windows as are worth a pass; they depend on shapes alone, since bits depend on them."""
    count = max(1, windows // -(-_PART_TOKENS // tokens))
    bounds = [windows * index // count for index in range(count + 1)]
    return [slice(*pair) for pair in pairwise(bounds)]


def _tried(block: nn.Module, calls: Sequence[Sequence[LayerCall]], parts: list[list[slice]]) -> list[list[slice]]:
    """The parts, and none of a batch that the block does not take part by part; tried on the first batch of each size."""
    apart: dict[tuple[int, ...], bool] = {}
    sizes = [tuple(uses[0].hidden.shape[:2]) for uses in calls]
    for size, uses, found in zip(sizes, calls, parts, strict=True):
        if size not in apart:
            apart[size] = len(found) == 1 or all(call.comes_apart(block, found) for call in uses)
    return [found if apart[size] else [] for size, found in zip(sizes, parts, strict=True)]


def _train_model(job: _Job) -> _Trained:
    """Train the whole model against the logits of the dense one and, where the refiner asks for them, hidden states on the way.

    Without logits, against its embeddings or hidden states. The dense model runs along: a view of the model with the dense
    parameters in the place of its own. Both run in the refiner's compute dtype; factors, norms' weights, their gradients and Adam's
    moments are float32.
    """
    context, model = job.context, job.module
    spec = job.share.entry.config.calibration
    assert spec is not None
    batches, dense = context.batches(spec), dict(shared_names(model, context.weights.originals))
    compute = job.refiner.compute_dtype(next(model.parameters()))
    factors, vectors = _trainables(job, model, "", products_of(compute))
    names = [context.stacks.block_name(index) for index in context.blocks]
    task, compared = model_task(
        job.refiner, model, dense, factors, vectors, batches, names=names, stride=job.row.logit_stride
    )
    trained = _train(job, task, tokens=sum(leading(batch).numel() for batch in batches), compute=compute)
    outputs = "" if compared == {("logits",)} else ", ".join(sorted({name for names in compared for name in names}))
    stride = 1 if outputs else job.row.logit_stride
    return replace(trained, result=replace(trained.result, outputs=outputs, logit_stride=stride))


def products_of(compute: torch.dtype) -> torch.dtype:
    """The dtype of the factors' products in passes of that dtype."""
    return torch.bfloat16 if compute == torch.bfloat16 else torch.float32


def model_task(
    refiner: Refiner[Any],
    model: nn.Module,
    dense: Mapping[str, Tensor],
    factors: Mapping[str, TrainableFactors],
    vectors: Mapping[str, nn.Parameter],
    batches: Sequence[Batch],
    *,
    names: Sequence[str],
    stride: int,
) -> tuple[RefineTask, set[tuple[str, ...]]]:
    """The whole model as a unit, with blocks of these names and `dense` parameters; and names of the outputs that it compares.

    The second is filled as the task is run.
    """
    tapped = {names[i]: reads_of(model, names[i], batches[0]) for i in refiner.hidden_layers(len(names))}
    compute = refiner.compute_dtype(next(model.parameters()))
    base = _converted(model, compute, but={f"{name}.weight" for name in factors})
    student = Student.of(base, "", factors, vectors)
    compared: set[tuple[str, ...]] = set()

    def run(network: nn.Module, batch: int, windows: slice) -> UnitOutput:
        taken = {name: _tap(network.get_submodule(name)) for name in tapped}
        given = some_of(batches[batch], windows)
        found, thinned = _some_logits(network, given, stride, batch)
        compared.add(found.names)
        hidden = [kept_of(given, tapped[name], output) for name, outputs in taken.items() for output in outputs]
        first, *others = [kept_of(thinned, written_or_read(given), tensor) for tensor in found.tensors]
        return UnitOutput(first, (*others, *hidden), logits=found.logits)

    def forward(batch: int, windows: slice = _ALL) -> UnitOutput:
        return run(student.module(copied=[*tapped]), batch, windows)

    def target(batch: int, windows: slice = _ALL) -> UnitOutput:
        return run(dense_view(base, dense, copied=[*tapped]), batch, windows)

    parts = _parts([leading(batch) for batch in batches])
    return RefineTask(factors, vectors, len(batches), forward, target, parts), compared


def _some_logits(network: nn.Module, batch: Batch, stride: int, first: int) -> tuple[MainOutput, Batch]:
    """What counts of a model's output, of logits those of every n-th token; and the batch's masks of the same tokens.

    They begin at a place that depends on the batch, so that all places of a window count. A model that takes `logits_to_keep` is
    spared the others; of one that does not, they are left out afterwards.
    """
    if stride == 1:
        return main_output(feed(network, batch)), batch
    length = batch[TOKENS].shape[1] if TOKENS in batch else 0
    kept = torch.arange(first % stride, length, stride, device=leading(batch).device)
    spares = length > stride and _KEEP in parameters_of(network)
    found = main_output(feed(network, batch, **{_KEEP: kept}) if spares else feed(network, batch))
    if not found.logits or found.tensors[0].ndim < 3:
        return found, batch
    (logits,) = found.tensors
    if not spares or logits.shape[1] != len(kept):
        length = logits.shape[1]
        kept = torch.arange(first % stride if length > stride else 0, length, stride, device=logits.device)
        logits = logits[:, kept]
    thinned = {name: x[:, kept] for name, x in batch.items() if x.ndim == 2 and x.shape[1] == length}
    return replace(found, tensors=(logits,)), thinned


def _converted(model: nn.Module, dtype: torch.dtype, *, but: Collection[str]) -> nn.Module:
    """A view of the model with its floating-point parameters in another dtype; those that it shares stay shared.

    Parameters named in `but` stay as they are: whoever uses the view puts others in their place.
    """
    own = {name: p for name, p in model.named_parameters(remove_duplicate=False) if name not in but}
    changed = {id(p): p for p in own.values() if p.is_floating_point() and p.dtype != dtype}
    new = {key: nn.Parameter(p.detach().to(dtype), requires_grad=False) for key, p in changed.items()}
    return view(model, {name: new[id(p)] for name, p in own.items() if id(p) in new}) if new else model


def _train(job: _Job, task: RefineTask, *, tokens: int, compute: torch.dtype) -> _Trained:
    started = time.perf_counter()
    context, module = job.context, job.module
    task = replace(task, snapshot=context.snapshot(job.key))
    # The factors stand for these weights while they are trained, and make them anew in the end.
    own = [f"{name}.weight" for name in task.factors]
    with located(job.share.entry, job.row.unit):
        with frozen(module), context.weights.lent(own):
            outcome = job.refiner.refine(task, context.told(job.row.unit, job.row))
        packed = {
            name: _packed(name, factors, job.packed[name], context.storage.factor_dtype)
            for name, factors in task.factors.items()
        }
    changed = {
        name: value.detach()
        for name, value in task.vectors.items()
        if not torch.equal(value, module.get_parameter(name.removeprefix(job.prefix)))
    }
    result = RefineResult(
        modifier=job.share.entry.key,
        unit=job.row.unit,
        losses=outcome.losses,
        steps=outcome.steps,
        clipped=outcome.clipped,
        whole_batches=sum(not parts for parts in task.parts),
        stop_reason=outcome.stop_reason,
        compute_dtype=str(compute).removeprefix("torch."),
        modules=len(task.factors),
        norm_values=sum(value.numel() for value in changed.values()),
        tokens=tokens,
        seconds=time.perf_counter() - started,
    )
    return _Trained(result, packed, changed)


def _rounded(trained: _Trained, key: str, context: BlockContext) -> Changes:
    """What was trained, as it is stored."""
    compute, storage = next(context.model.parameters()).dtype, context.storage
    weights = {}
    for name, packed in trained.factors.items():
        folded = (
            loaded_weight(packed, compute)
            if storage.packed
            else packed.fold(torch.float32).to(storage.dtype).to(compute)
        )
        weights[f"{name}.weight"] = folded
    for name, vector in trained.vectors.items():
        weights[name] = vector.to(storage.dtype).to(compute)
    return Changes(
        step=key,
        weights=weights,
        factors=trained.factors,
        packed=storage.packed,
        modules={name: _refined(context.state.modules[name], trained.result.modifier) for name in trained.factors},
        results=(trained.result,),
    )


def _refined(result: ModuleResult, modifier: str) -> ModuleResult:
    return replace(result, refined=(*result.refined, modifier))


def _packed(name: str, factors: TrainableFactors, before: PackedLinear, dtype: torch.dtype) -> PackedLinear:
    """Rounded and packed, a quantised core as it was. Raises CheckpointError with the module's name where a value overflows."""
    try:
        if before.scale is None:
            return PackedLinear.from_factorization(factors, dtype)
        a, b = (part.detach().to(dtype).contiguous() for part in (factors.a, factors.b))
        packed = replace(before, a=a, b=b)
        packed.validate()
    except CheckpointError as error:
        raise CheckpointError(f"{name}: {error}; lower `learning_rate`") from error
    return packed


def _trainables(
    job: _Job, module: nn.Module, prefix: str, products: torch.dtype = torch.float32
) -> tuple[dict[str, TrainableFactors], dict[str, nn.Parameter]]:
    """Factors of the modules, and copies of the weights of the unit's norms. A B that modules share stays one.

    A norm is a module without children whose parameters are all vectors: no list of classes knows every model's.
    """
    factors = {}
    shared: dict[str, nn.Parameter] = {}
    for name, packed in job.packed.items():
        core, mask = packed.unpack(name=name)
        factors[name] = TrainableFactors(packed.a, core, mask, packed.b, products, packed.activations)
        factors[name].b = shared.setdefault(job.context.state.sharing[name], factors[name].b)
    vectors = {
        f"{prefix}{owner}.{name}": nn.Parameter(parameter.detach().float().clone())
        for owner, part in module.named_modules()
        if not any(True for _ in part.children()) and all(parameter.ndim == 1 for parameter in part.parameters())
        for name, parameter in part.named_parameters()
    }
    return factors, vectors


@dataclass(frozen=True, slots=True)
class Student:
    """A module whose linear layers factors stand for, and whose norms' vectors are trained, wherever the module uses them.

    `linears` and `places` say which of them stands where: names from the module.
    """

    base: nn.Module
    factors: Mapping[str, TrainableFactors]
    vectors: Mapping[str, nn.Parameter]
    linears: Mapping[str, str]
    places: Mapping[str, str]

    @classmethod
    def of(
        cls, base: nn.Module, prefix: str, factors: Mapping[str, TrainableFactors], vectors: Mapping[str, nn.Parameter]
    ) -> Student:
        """Find the places."""
        weights = {f"{name}.weight".removeprefix(prefix): name for name in factors}
        found = {place.removesuffix("weight").rstrip("."): name for place, name in shared_names(base, weights)}
        inner = {name.removeprefix(prefix): name for name in vectors}
        return cls(base, factors, vectors, found, dict(shared_names(base, inner)))

    def module(self, copied: Sequence[str] = ()) -> nn.Module:
        """A view with the present values. Modules in `copied` are its own even where nothing inside is replaced."""
        own: dict[str, nn.Module | Tensor] = {}
        for place, name in self.linears.items():
            linear = self.base.get_submodule(place)
            assert isinstance(linear, nn.Linear)
            own[place] = TrainableLinear(self.factors[name], linear.bias)
        for place, name in self.places.items():
            own[place] = self.vectors[name].to(self.base.get_parameter(place).dtype)
        return view(self.base, own, copied=copied)


def _tap(layer: nn.Module) -> list[Tensor]:
    """A list that the layer of a view puts its hidden states into."""
    taken: list[Tensor] = []
    layer.register_forward_hook(lambda _, __, output: taken.append(hidden_states(output)))
    return taken
