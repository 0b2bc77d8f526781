"""`Smoother`: moves scales from a module's outputs into the linear modules that read them, and leaves the block's function."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from armor_recipes.errors import NumericalError, PlanError
from armor_recipes.model.calls import LayerCall
from armor_recipes.model.experts import can_call_every_expert, every_expert
from armor_recipes.model.padding import Padding
from armor_recipes.model.views import view
from armor_recipes.modifiers.base import AnyModifier, C, Needs
from armor_recipes.modifiers.kinds.changes import Changes, StepResult
from armor_recipes.modifiers.kinds.contract import BlockContext, Kind, Planned, Planning, Row, Share, Unit, located
from armor_recipes.modifiers.kinds.parents import CallsOf, first_output, first_tensor
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
        """The module, and the readers."""
        return (*self.readers, self.source)

    @property
    def exact(self) -> bool:
        """Whether `readers` are those that read the outputs, and none of them only may."""
        return self.given

    @property
    def misfit(self) -> str:
        """Why it must be left as it is, where shapes tell; empty where they do not."""
        return ""


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


@dataclass(frozen=True, slots=True)
class SearchResult(SmoothingResult):
    """The same, where scales were searched: the best candidate's `power` and whether it looks at weights (`duo`), its loss and that
    of the first candidate, None where it is not finite.
    """

    power: float = 0.0
    duo: bool = False
    loss: float = 0.0
    first_loss: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Smoothed:
    """What a module's scales are chosen on.

    Attributes:
        readers: the modules that read its outputs, and `weights` theirs `(O, I)` as they have become by now.
        spread: the range of each of its outputs, `(I,)`; None where the modifier wants none.
        changed: parameters that will not be the model's any more, by full name.
        calls: what modules of the block are called with.
    """

    share: Share
    row: SmoothingPlan
    context: BlockContext
    readers: tuple[str, ...]
    weights: tuple[Tensor, ...]
    spread: Tensor | None
    changed: Mapping[str, Tensor]
    calls: CallsOf


@dataclass(frozen=True, slots=True, eq=False)
class Scales:
    """What to divide a module's outputs by `(I,)`, and what is told of the search for it; or why it is `left` as it is."""

    values: Tensor
    search: Mapping[str, Any] = field(default_factory=dict)
    left: str = ""


@dataclass(slots=True)
class _Seen:
    """A module on the calibration: the extremes of its outputs by channel and how many there are, who read the first of them, and
    its first input.
    """

    readers: list[str]
    first: Tensor
    width: int
    low: Tensor | None = None
    high: Tensor | None = None

    @property
    def spread(self) -> Tensor | None:
        """The range of each channel, `(I,)`."""
        return None if self.low is None or self.high is None else self.high - self.low

    def take(self, rows: Tensor) -> None:
        """Widen the extremes by outputs `(T, I)`."""
        low, high = rows.amin(0), rows.amax(0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


class Smoothing(Kind):
    """Smooths a block's modules one after the other, each checked on the first batch. Other modules that `targets` matches, such as
    a tied output layer, are no matter.
    """

    chooses: ClassVar[bool] = True

    def plan(self, planning: Planning, modifier: Smoother[Any]) -> Planned:
        """A row for each module whose outputs linear modules of its block may read."""
        rows = tuple(_rows(planning, modifier))
        if planning.entry.config.optional:
            return modifier.planned(planning, rows)
        vain = tuple(_vain_links(planning, modifier))
        if vain:
            return Planned((), vain)
        if rows:
            return modifier.planned(planning, rows)
        advice = "widen `targets`" if modifier.links else "give `mappings`"
        text = "no module was found whose outputs linear modules of `targets` could read"
        return Planned((), (f"{text}; {advice}",))

    @torch.no_grad()
    def run(self, unit: Unit, context: BlockContext) -> Changes:
        """Find the scales, on a view of the block. Raises PlanError where mappings of the recipe change the block's function."""
        (share,) = unit.shares
        weights: dict[str, Tensor] = {}
        results: list[StepResult] = []
        seen, before = _watch(share, context)
        calls = CallsOf(share, context, weights)
        for row in share.rows:
            with located(share.entry, row.source):
                results.append(_smooth(share, row, seen.get(row.source), before, context, weights, calls))
            context.progress(row)
        stored = {name: value.to(context.storage.dtype).to(value.dtype) for name, value in weights.items()}
        return Changes(unit.key, stored, results=tuple(results), same_function=True)


class Smoother(AnyModifier[C]):
    """Divides outputs of norms by scales that it multiplies into the linear modules behind them; the function stays.

    It runs in a block before all modifiers that change the block.
    """

    kind: ClassVar[Kind] = Smoothing()
    category: ClassVar[str] = "smooth"
    ranges: ClassVar[bool] = True
    """Whether scales are chosen on the ranges of all outputs."""

    @property
    def needs(self) -> Needs:
        """The model as compressed so far, before anything else in the block."""
        return Needs(streams=("compressed",), when="before")

    @property
    def links(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """Patterns of readers with that of what they read, where the recipe gives some; empty to find norms and their readers."""
        return ()

    @property
    def pairs(self) -> tuple[tuple[tuple[str, ...], str], ...]:
        """Patterns of readers with that of the linear module that they may read, besides norms, where the recipe gives no links."""
        return ()

    def planned(self, planning: Planning, rows: tuple[SmoothingPlan, ...]) -> Planned:  # noqa: ARG002 - for those that choose
        """What becomes of the rows of all that may be smoothed."""
        return Planned(rows)

    @abstractmethod
    def scales(self, found: Smoothed) -> Scales:
        """What to divide a module's outputs by, the weights that read them being multiplied by the same."""


def _vain_links(planning: Planning, modifier: Smoother[Any]) -> Iterator[str]:
    """What is wrong with pairs of the recipe that nothing in any layer matches."""
    from compressed_tensors.utils import is_match

    inside = [_Inside.of(planning, layer, linears) for layer, linears in _by_layer(planning).items()]
    for patterns, pattern in modifier.links:
        advice = "correct the pair in `mappings`, or say `optional: true`"
        if not any(is_match(name, m, pattern) for one in inside for name, m in one.modules.items()):
            where = f"{pattern!r} matches nothing inside of a layer"
            yield f"no module was found whose outputs {list(patterns)} could read: {where}; {advice}"
        elif not any(is_match(name, m, list(patterns)) for one in inside for name, m in one.readable.items()):
            yield f"no linear module inside of a layer was found by {list(patterns)}, to read the outputs of {pattern!r}; {advice}"


def _by_layer(planning: Planning) -> dict[int, list[str]]:
    """Linear modules of each block that have their weight to themselves."""
    blocks: dict[int, list[str]] = {}
    for name in planning.linears.modules:
        layer = planning.stacks.block_of(name)
        if layer is not None and not planning.linears.others(name):
            blocks.setdefault(layer, []).append(name)
    return blocks


def _rows(planning: Planning, modifier: Smoother[Any]) -> Iterator[SmoothingPlan]:
    targeted = frozenset(planning.names)
    for layer, linears in _by_layer(planning).items():
        inside = _Inside.of(planning, layer, linears)
        for source, readers, given in inside.sources(planning.entry.config.ignore, modifier):
            wanted = tuple(name for name in readers if name in targeted)
            if wanted:
                size = sum(inside.readable[name].weight.numel() for name in readers)
                yield SmoothingPlan(
                    modifier=planning.entry.key,
                    stage=planning.entry.stage,
                    layer=layer,
                    source=source,
                    readers=readers,
                    wanted=wanted,
                    given=given,
                    flops=10.0 * size,
                    peak_bytes=12 * size,
                )


@dataclass(frozen=True, slots=True, eq=False)
class _Inside:
    """The modules of a block by full name, and those of them that read a tensor by a weight `(O, I)`: linear ones and routers."""

    modules: Mapping[str, nn.Module]
    readable: Mapping[str, Any]

    @classmethod
    def of(cls, planning: Planning, layer: int, linears: Sequence[str]) -> _Inside:
        prefix, block = planning.stacks.block_name(layer), planning.stacks.block(layer)
        modules = {name: module for name, module in block.named_modules(prefix=prefix) if name != prefix}
        routers = {name: module for name, module in modules.items() if _is_router(module)}
        return cls(modules, {**{name: planning.linears.modules[name] for name in linears}, **routers})

    def sources(self, ignore: Sequence[str], modifier: Smoother[Any]) -> Iterator[tuple[str, tuple[str, ...], bool]]:
        """Modules with those that may read their outputs, and whether the recipe says so: norms first."""
        from compressed_tensors.utils import is_match

        widths: dict[int, list[str]] = {}
        for name, module in self.readable.items():
            widths.setdefault(module.weight.shape[1], []).append(name)
        sources = {name: m for name, m in self.modules.items() if not (ignore and is_match(name, m, ignore))}
        for name, module in sources.items() if not modifier.links else ():
            width = _norm_width(module)
            if width is not None:
                yield name, tuple(widths.get(width, ())), False
        for patterns, pattern in modifier.links or modifier.pairs:
            nearest = _Nearest([name for name, m in self.readable.items() if is_match(name, m, list(patterns))])
            for name in (name for name, module in sources.items() if is_match(name, module, pattern)):
                yield name, nearest.of(name), bool(modifier.links)


class _Nearest:
    """Modules of a block by the modules that they are in: an expert's are its own readers, and not those of the others."""

    def __init__(self, names: Sequence[str]) -> None:
        self._below: dict[str, list[str]] = {}
        for name in names:
            for above in _above(name):
                self._below.setdefault(above, []).append(name)

    def of(self, source: str) -> tuple[str, ...]:
        """Those in the innermost module that holds the source and any of them, without the source."""
        for above in _above(source):
            found = tuple(name for name in self._below.get(above, ()) if name != source)
            if found:
                return found
        return ()


def _above(name: str) -> Iterator[str]:
    """Names of the modules that a module is in, the innermost first."""
    while name:
        name = name.rpartition(".")[0]
        yield name


def _is_router(module: nn.Module) -> bool:
    """Whether a module that is no linear layer has a weight `(O, I)` and nothing inside, as routers of experts do."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear | nn.Embedding) or any(module.children()):
        return False
    return weight is not None and weight.ndim == 2


def _norm_width(module: nn.Module) -> int | None:
    """Channels of a norm (a module without children whose parameters are vectors of one length); None for anything else."""
    shapes = {tuple(value.shape) for value in module.parameters(recurse=False)}
    lengths = {shape[0] for shape in shapes if len(shape) == 1}
    return lengths.pop() if len(shapes) == len(lengths) == 1 and not any(module.children()) else None


def _watch(share: Share, context: BlockContext) -> tuple[dict[str, _Seen], Tensor]:
    """What the sources give on the share's calibration, and the block's output on its first call."""
    prefix = f"{context.name}."
    sources = {row.source.removeprefix(prefix) for row in share.rows}
    readers = {name.removeprefix(prefix) for row in share.rows for name in row.readers}
    block = view(context.module, {}, copied=[*dict.fromkeys([*sorted(sources), *sorted(readers)])])
    watch = _Watch({}, {})
    for name in sorted(readers):
        block.get_submodule(name).register_forward_pre_hook(watch.reading(prefix + name), with_kwargs=True)
    for name in sorted(sources):
        block.get_submodule(name).register_forward_hook(watch.giving(prefix + name), with_kwargs=True)
    modifier: Any = share.modifier
    (source,) = modifier.needs.streams
    stream = context.stream(share, source)
    before: list[Tensor] = []
    for calls, padding in zip(stream.uses(context.index), stream.paddings(context.index), strict=True):
        if not before and any(map(can_call_every_expert, block.modules())):
            with every_expert(block):  # in use an expert reads a copy of its own rows
                _watched(watch, calls[0], block, None)
        before += [_watched(watch, call, block, padding) for call in calls][: 1 - len(before)]
        if not modifier.ranges:
            break
    return watch.seen, before[0]


def _watched(watch: _Watch, call: LayerCall, block: nn.Module, padding: Padding | None) -> Tensor:
    """One call of the watched block; returns its output. Without a padding no extremes are taken."""
    watch.padding, watch.alive = padding, {}
    return call.run(block)


@dataclass(slots=True)
class _Watch:
    """Hooks that see what modules give and who reads it; `alive` holds a call's outputs, so that none takes another's place."""

    seen: dict[str, _Seen]
    alive: dict[tuple[Any, ...], tuple[str, Tensor]]
    padding: Padding | None = None

    def giving(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            x = first_output(output)
            self.alive[_place(x)] = name, x
            seen = self.seen.setdefault(name, _Seen([], first_tensor(args, kwargs), x.shape[-1]))
            if self.padding is not None:
                seen.take(torch.cat([piece.flatten(0, -2) for piece in self.padding.pieces(x)]))

        return hook

    def reading(self, name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found = self.alive.get(_place(first_tensor(args, kwargs)))
            if found is not None and name not in self.seen[found[0]].readers:
                self.seen[found[0]].readers.append(name)

        return hook


def _place(x: Tensor) -> tuple[Any, ...]:
    """Where a tensor `(…, I)` lies: the same for all views of it as rows of I."""
    return (x.untyped_storage().data_ptr(), x.storage_offset(), x.numel(), x.shape[-1])


def _smooth(
    share: Share,
    row: SmoothingPlan,
    seen: _Seen | None,
    before: Tensor,
    context: BlockContext,
    weights: dict[str, Tensor],
    calls: CallsOf,
) -> SmoothingResult:
    """Smooth one module's outputs; adds the new weights to those of the modules before."""
    started = time.perf_counter()
    modifier: Any = share.modifier
    readers = row.readers if row.exact or seen is None else tuple(name for name in row.readers if name in seen.readers)
    left = row.misfit or _nothing_to_do(row, seen, readers, modifier) or _unfit(row, seen, readers, context, modifier)
    chosen: Scales | None = None
    if not left and seen is not None:
        matrices = {name: _read(f"{name}.weight", context, weights) for name in readers}
        probe = torch.linspace(0.5, 2, next(iter(matrices.values())).shape[1])
        scaled = {} if modifier.ranges else _scaled(share, row.source, seen, before, context, weights, probe, matrices)
        if not isinstance(scaled, str):  # a search is long
            work = Smoothed(share, row, context, readers, tuple(matrices.values()), seen.spread, weights, calls)
            chosen = modifier.scales(work)
            values = chosen.values
            scaled = chosen.left or _scaled(share, row.source, seen, before, context, weights, values, matrices)
        if isinstance(scaled, str):
            left = scaled
        else:
            weights |= scaled
    if left and row.given and not row.misfit:
        raise PlanError(
            f"`mappings` cannot be smoothed ({', '.join(readers)}): {left}; correct them. The weights are as they were"
        )
    scales = torch.ones(1) if chosen is None or left else chosen.values
    found = SmoothingResult(
        modifier=share.entry.key,
        source=row.source,
        readers=readers,
        least=float(scales.min()),
        largest=float(scales.max()),
        left=left,
        seconds=time.perf_counter() - started,
    )
    if chosen is None or not chosen.search:
        return found
    return SearchResult.from_record({**found.record(), **chosen.search})


def _scaled(
    share: Share,
    source: str,
    seen: _Seen,
    before: Tensor,
    context: BlockContext,
    weights: Mapping[str, Tensor],
    values: Tensor,
    matrices: Mapping[str, Tensor],
) -> dict[str, Tensor] | str:
    """The parameters with the scales in them; why it cannot be, else."""
    like = next(iter(matrices.values()))
    scales = values.to(like)
    if not bool(scales.isfinite().all()):
        raise NumericalError(f"the outputs of {source} are not finite: check the model's weights")
    divided = _divided(source, context, seen, scales, weights)
    if divided is None:
        return "its class does not multiply by its weights"
    new = {f"{name}.weight": matrix * scales for name, matrix in matrices.items()} | divided
    return _other_function(share, context, before, {**weights, **new}) or new


def _nothing_to_do(row: SmoothingPlan, seen: _Seen | None, readers: Sequence[str], modifier: Smoother[Any]) -> str:
    if seen is None or (modifier.ranges and seen.spread is None):
        return "it is not called"
    return "" if any(name in row.wanted for name in readers) else "no target reads its output"


def _unfit(
    row: SmoothingPlan, seen: _Seen | None, readers: Sequence[str], context: BlockContext, modifier: Smoother[Any]
) -> str:
    """Why the readers cannot read its outputs channel by channel; empty where they can. Of a layer that holds several projections
    a search takes the last.
    """
    if any(context.model.get_submodule(row.source).children()):
        return "it has layers in it: name the one whose outputs are read"
    columns = {name: _columns(context.model.get_submodule(name)) for name in readers}
    for name, count in columns.items():
        if seen is not None and (seen.width < count or (modifier.ranges and seen.width != count)):
            return f"it puts out {seen.width} numbers, and {name} reads {count}"
    return "" if len(set(columns.values())) <= 1 else f"they read {' and '.join(map(str, columns.values()))} numbers"


def _columns(module: Any) -> int:
    return int(module.weight.shape[1])


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
    x = seen.first
    output = first_output(view(module, own)(x))  # a linear module may have been multiplied by scales before
    # Of a layer that holds several projections in its rows the last is read: value, or up.
    every = torch.cat([scales.new_ones(output.shape[-1] - len(scales)), scales])
    plain = {name: value / (every[:, None] if value.ndim > 1 else every) for name, value in own.items()}
    ways = [plain]
    if "weight" in own and own["weight"].ndim == 1:
        ways.append({**plain, "weight": (own["weight"] + 1) / every - 1})
    for way in ways:
        found = first_output(view(module, way)(x))
        if relative_error(output / every, found) <= _TOLERANCE:
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
