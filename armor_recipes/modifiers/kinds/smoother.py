"""`Smoother`: moves scales from a module's outputs into the linear modules that read them, and leaves the block's function."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from armor_recipes.errors import NumericalError, PlanError
from armor_recipes.model.calls import LayerCall
from armor_recipes.model.hooks import input_of
from armor_recipes.model.padding import Padding
from armor_recipes.model.views import view
from armor_recipes.modifiers.base import AnyModifier, C, Needs
from armor_recipes.modifiers.kinds.changes import Changes, StepResult
from armor_recipes.modifiers.kinds.contract import BlockContext, Kind, Planned, Planning, Row, Share, Unit, located
from armor_recipes.solver import relative_error

#: A smoothed block must give its output again up to this share of the output's norm, in float32.
_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class SmoothingPlan(Row):
    """One module of block `layer` whose outputs are smoothed, and the linear modules that may read them.

    `readers` are exact where the recipe gives them (`given`); else those of them that read the very tensor are found by running.
    `wanted` are the readers that the entry's targets hold.
    """

    section: ClassVar[str] = "smoothings"

    modifier: str
    stage: str
    layer: int
    source: str
    readers: tuple[str, ...]
    wanted: tuple[str, ...]
    given: bool
    flops: float
    peak_bytes: int

    @property
    def touches(self) -> tuple[str, ...]:
        """The readers."""
        return self.readers


@dataclass(frozen=True, slots=True)
class SmoothingResult(StepResult):
    """What was smoothed: the scales' extremes, or why the module was left as it is (`left`, empty where it was smoothed)."""

    section: ClassVar[str] = "smoothings"

    modifier: str
    source: str
    readers: tuple[str, ...]
    least: float
    largest: float
    left: str
    seconds: float


@dataclass(slots=True)
class _Seen:
    """A module's outputs on the calibration: their extremes by channel, who read the first, and its first input and output."""

    low: Tensor
    high: Tensor
    readers: list[str]
    first: tuple[Tensor, Tensor]


class Smoothing(Kind):
    """Smooths a block's modules one after the other, each checked on the first batch. Other modules that `targets` matches, such as
    a tied output layer, are no matter.
    """

    chooses: ClassVar[bool] = True

    def plan(self, planning: Planning, modifier: Smoother[Any]) -> Planned:
        """A row for each module whose outputs linear modules of its block may read."""
        rows = tuple(_rows(planning, modifier))
        text = "no module was found whose outputs linear modules of `targets` could read; give `mappings`"
        return Planned(rows, () if rows or planning.entry.config.optional else (text,))

    @torch.no_grad()
    def run(self, unit: Unit, context: BlockContext) -> Changes:
        """Find the scales, on a view of the block. Raises PlanError where mappings of the recipe change the block's function."""
        (share,) = unit.shares
        weights: dict[str, Tensor] = {}
        results: list[StepResult] = []
        seen, before = _watch(share, context)
        for row in share.rows:
            with located(share.entry, row.source):
                results.append(_smooth(share, row, seen.get(row.source), before, context, weights))
            context.progress(row.flops)
        stored = {name: value.to(context.storage.dtype).to(value.dtype) for name, value in weights.items()}
        return Changes(unit.key, stored, results=tuple(results), same_function=True)


class Smoother(AnyModifier[C]):
    """Divides outputs of norms by scales that it multiplies into the linear modules behind them; the function stays.

    It runs in a block before all modifiers that change the block.
    """

    kind: ClassVar[Kind] = Smoothing()
    category: ClassVar[str] = "smooth"

    @property
    def needs(self) -> Needs:
        """The model as compressed so far, before anything else in the block."""
        return Needs(streams=("compressed",), when="before")

    @property
    def links(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """Patterns of readers with that of what they read, where the recipe gives some; empty to find norms and their readers."""
        return ()

    @abstractmethod
    def scales(self, spread: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """What to divide the channels by `(I,)`, from their ranges `(I,)` and the weights `(O, I)` that read them."""


def _rows(planning: Planning, modifier: Smoother[Any]) -> Iterator[SmoothingPlan]:
    blocks: dict[int, list[str]] = {}
    for name in planning.linears.modules:
        layer = planning.stacks.block_of(name)
        if layer is not None and not planning.linears.others(name):
            blocks.setdefault(layer, []).append(name)
    for layer, linears in blocks.items():
        for source, readers in _sources(planning, modifier, layer, linears):
            wanted = tuple(name for name in readers if name in planning.names)
            if wanted:
                size = sum(planning.linears.modules[name].weight.numel() for name in readers)
                yield SmoothingPlan(
                    modifier=planning.entry.key,
                    stage=planning.entry.stage,
                    layer=layer,
                    source=source,
                    readers=readers,
                    wanted=wanted,
                    given=bool(modifier.links),
                    flops=10.0 * size,
                    peak_bytes=12 * size,
                )


def _sources(
    planning: Planning, modifier: Smoother[Any], layer: int, linears: Sequence[str]
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Modules of a block with the linear ones that may read their outputs."""
    from compressed_tensors.utils import is_match

    prefix, ignore = planning.stacks.block_name(layer), planning.entry.config.ignore
    inside = [(name, m) for name, m in planning.stacks.block(layer).named_modules(prefix=prefix) if name != prefix]
    for source, module in inside:
        if ignore and is_match(source, module, ignore):
            continue
        if not modifier.links:
            width = _norm_width(module)
            readers = [name for name in linears if planning.linears.modules[name].in_features == width]
            yield source, tuple(readers)
        for patterns, pattern in modifier.links:
            if is_match(source, module, pattern):
                found = [name for name in linears if is_match(name, planning.linears.modules[name], patterns)]
                yield source, tuple(name for name in found if name != source)


def _norm_width(module: nn.Module) -> int | None:
    """Channels of a norm (a module without children whose parameters are vectors of one length); None for anything else."""
    shapes = {tuple(value.shape) for value in module.parameters(recurse=False)}
    lengths = {shape[0] for shape in shapes if len(shape) == 1}
    return lengths.pop() if len(shapes) == len(lengths) == 1 and not any(module.children()) else None


def _watch(share: Share, context: BlockContext) -> tuple[dict[str, _Seen], Tensor]:
    """What the sources give on the share's calibration, and the block's output on its first call."""
    prefix = f"{context.name}."
    sources = {row.source.removeprefix(prefix) for row in share.rows}
    linears = {name.removeprefix(prefix) for row in share.rows for name in row.readers}
    block = view(context.module, {}, copied=[*dict.fromkeys([*sorted(sources), *sorted(linears)])])
    watch = _Watch({}, {})
    for name in sorted(linears):
        block.get_submodule(name).register_forward_pre_hook(watch.reading(prefix + name), with_kwargs=True)
    for name in sorted(sources):
        block.get_submodule(name).register_forward_hook(watch.giving(prefix + name), with_kwargs=True)
    (source,) = share.modifier.needs.streams
    stream = context.stream(share, source)
    before: list[Tensor] = []
    for calls, padding in zip(stream.uses(context.index), stream.paddings(context.index), strict=True):
        before += [_watched(watch, call, block, padding) for call in calls][: 1 - len(before)]
    return watch.seen, before[0]


def _watched(watch: _Watch, call: LayerCall, block: nn.Module, padding: Padding) -> Tensor:
    """One call of the watched block; returns its output."""
    watch.padding, watch.alive = padding, {}
    return call.run(block)


@dataclass(slots=True)
class _Watch:
    """Hooks that see what modules give and who reads it; `alive` holds a call's outputs, so that none takes another's place."""

    seen: dict[str, _Seen]
    alive: dict[int, tuple[str, Tensor]]
    padding: Padding | None = None

    def giving(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            self.alive[id(x)] = name, x
            assert self.padding is not None
            rows = torch.cat([piece.flatten(0, -2) for piece in self.padding.pieces(x)])
            low, high = rows.amin(0), rows.amax(0)
            old = self.seen.get(name)
            if old is None:
                self.seen[name] = _Seen(low, high, [], (input_of(args, kwargs), x))
            else:
                old.low, old.high = torch.minimum(old.low, low), torch.maximum(old.high, high)

        return hook

    def reading(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = self.alive.get(id(input_of(args, kwargs)))
            if found is not None and name not in self.seen[found[0]].readers:
                self.seen[found[0]].readers.append(name)

        return hook


def _smooth(
    share: Share,
    row: SmoothingPlan,
    seen: _Seen | None,
    before: Tensor,
    context: BlockContext,
    weights: dict[str, Tensor],
) -> SmoothingResult:
    """Smooth one module's outputs; adds the new weights to those of the modules before."""
    started = time.perf_counter()
    modifier: Any = share.modifier
    readers = row.readers if row.given or seen is None else tuple(name for name in row.readers if name in seen.readers)
    left = _nothing_to_do(row, seen, readers)
    scales = torch.ones(1)
    if not left and seen is not None:
        matrices = [_read(f"{name}.weight", context, weights) for name in readers]
        scales = modifier.scales(seen.high - seen.low, matrices).to(matrices[0].dtype)
        if not bool(scales.isfinite().all()):
            raise NumericalError(f"the outputs of {row.source} are not finite: check the model's weights")
        new = {f"{name}.weight": matrix * scales for name, matrix in zip(readers, matrices, strict=True)}
        divided = _divided(row.source, context, seen, scales, weights)
        left = "its class does not multiply by its weights" if divided is None else ""
        left = left or _other_function(share, context, before, {**weights, **new, **(divided or {})})
        if not left:
            weights |= {**new, **(divided or {})}
    if left and row.given:
        raise PlanError(
            f"`mappings` cannot be smoothed ({', '.join(readers)}): {left}; correct them. The weights are as they were"
        )
    return SmoothingResult(
        modifier=share.entry.key,
        source=row.source,
        readers=readers,
        least=float(scales.min()) if not left else 1.0,
        largest=float(scales.max()) if not left else 1.0,
        left=left,
        seconds=time.perf_counter() - started,
    )


def _nothing_to_do(row: SmoothingPlan, seen: _Seen | None, readers: Sequence[str]) -> str:
    if seen is None:
        return "it is not called"
    return "" if any(name in row.wanted for name in readers) else "no target reads its output"


def _read(parameter: str, context: BlockContext, weights: Mapping[str, Tensor]) -> Tensor:
    return weights[parameter] if parameter in weights else context.weights.read(parameter)


def _divided(
    source: str, context: BlockContext, seen: _Seen, scales: Tensor, weights: Mapping[str, Tensor]
) -> dict[str, Tensor] | None:
    """The module's parameters with which it gives its outputs divided by the scales; None where none of the ways is one.

    A norm multiplies by its weight or, as Gemma's, by one more than that: which of them is tried.
    """
    module = context.model.get_submodule(source)
    own = {name: _read(f"{source}.{name}", context, weights) for name, _ in module.named_parameters(recurse=False)}
    plain = {name: value / (scales[:, None] if value.ndim > 1 else scales) for name, value in own.items()}
    ways = [plain]
    if "weight" in own and own["weight"].ndim == 1:
        ways.append({**plain, "weight": (own["weight"] + 1) / scales - 1})
    x, output = seen.first
    for way in ways:
        found = view(module, way)(x)
        found = found[0] if isinstance(found, tuple) else found
        if relative_error(output / scales, found) <= _TOLERANCE:
            return {f"{source}.{name}": value for name, value in way.items()}
    return None


def _other_function(share: Share, context: BlockContext, before: Tensor, weights: Mapping[str, Tensor]) -> str:
    """Why the block with other weights gives another output on its first call; empty where it gives the same."""
    prefix = f"{context.name}."
    block = view(context.module, {name.removeprefix(prefix): value for name, value in weights.items()})
    (source,) = share.modifier.needs.streams
    (first, *_) = next(iter(context.stream(share, source).uses(context.index)))
    worst = relative_error(before, first.run(block))
    if worst <= max(_TOLERANCE, 4 * torch.finfo(before.dtype).eps):
        return ""
    return f"its output is read by more than these (the block's output would change by {worst:.3g} of its size)"
