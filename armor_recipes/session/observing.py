"""What a block's modifiers learn of it: streams of activations, statistics of modules' inputs, the block as it was."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from armor_recipes.calibration.inputs import InputSet
from armor_recipes.model.blocks import Stack, Stacks
from armor_recipes.model.experts import every_expert
from armor_recipes.model.hooks import Hooks, feeding
from armor_recipes.model.passes import PassStream
from armor_recipes.model.replay import Activations, Keep, StackProbe, as_it_is, open_stream, probe_stack
from armor_recipes.modifiers.base import Tap
from armor_recipes.modifiers.kinds.changes import StepResult
from armor_recipes.modifiers.kinds.contract import BlockContext, Original, Share, Statistics, StreamKey
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.session.taps import feed_tap


@dataclass(frozen=True, slots=True)
class PassesResult(StepResult):
    """A stack whose blocks were not run one by one: how many passes of the whole model took the place of that, and why."""

    section: ClassVar[str] = "passes_of_the_whole_model"

    stage: str
    stack: str
    blocks: int
    passes: int
    reason: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Door:
    """A stack's streams, and why its blocks are not run one by one; empty where they are."""

    streams: dict[StreamKey, Activations]
    reason: str = ""

    @property
    def passes(self) -> int:
        """Of the whole model so far."""
        return sum(stream.passes for stream in self.streams.values() if isinstance(stream, PassStream))


@dataclass(frozen=True, slots=True)
class Opening:
    """What a stack's streams are opened with.

    Attributes:
        keys: the streams that are wanted.
        sharing: numbers of other blocks that use weights of a block, by its number, where weights of this stack are planned that
            several blocks share.
        originals: the dense model's weights where they were changed since, asked for by passes that need them.
        taught: whether the model came changed already, so that dense streams are a teacher's.
        keep: where activations are put.
    """

    model: nn.Module
    stacks: Stacks
    stack: Stack
    keys: tuple[StreamKey, ...]
    tokens: Mapping[CalibrationSpec, InputSet]
    sharing: Mapping[int, Sequence[int]]
    originals: Callable[[], Mapping[str, Tensor]]
    hooks: Hooks
    taught: bool = False
    keep: Keep = as_it_is

    def open(self, kinds: Iterable[str]) -> Door:
        """The streams of these kinds, by replay of the blocks or, where that is not the model, by passes of it."""
        streams: dict[StreamKey, Activations] = {}
        probes: dict[CalibrationSpec, StackProbe] = {}
        keys = [key for key in self.keys if key[1] in kinds]
        reason = "its blocks share weights" if self.sharing else ""
        if self.taught and any(kind == "dense" for _, kind in keys):
            reason = reason or "the dense model is the teacher"
        for key in keys:
            spec, inputs = key[0], self.tokens[key[0]]
            if not reason:
                if spec not in probes:
                    probes[spec] = probe_stack(self.model, self.stack, inputs.tensors, self.hooks)
                problem = probes[spec].problem
                reason = f"running its blocks one by one does not reproduce the model ({problem})" if problem else ""
            if reason:
                streams[key] = self._passes(key)
            else:
                same = probes[spec].same
                streams[key] = open_stream(
                    self.model,
                    self.stack,
                    inputs.groups,
                    batch_size=spec.batch_size,
                    hooks=self.hooks,
                    same=same,
                    keep=self.keep,
                )
        return Door(streams, reason)

    def _passes(self, key: StreamKey) -> PassStream:
        return PassStream(
            self.model,
            self.stacks,
            self.stack,
            self.tokens[key[0]].groups,
            batch_size=key[0].batch_size,
            hooks=self.hooks,
            uses=lambda block: self.sharing.get(block, ()),
            originals=self.originals if key[1] == "dense" else None,
        )


def stream_keys(shares: Sequence[Share]) -> tuple[StreamKey, ...]:
    """The streams that the shares ask for, each once."""
    return tuple(dict.fromkeys(share.stream_key(kind) for share in shares for kind in share.streams))


def original_of(
    block: nn.Module, index: int, shares: Sequence[Share], streams: Mapping[StreamKey, Activations]
) -> Original | None:
    """The block as it is now, where a modifier compares with it."""
    if not any(share.modifier.needs.dense == "block" for share in shares):
        return None
    dense = {key: list(stream.uses(index)) for key, stream in streams.items() if key[1] == "dense"}
    return Original(copy.deepcopy(block), dense)


def observe(
    stream: Activations, shares: Sequence[Share], context: BlockContext, *, advance: bool
) -> dict[str, Statistics]:
    """Run the block once with a hook on every module that one of the shares observes; statistics by entry and module.

    With `advance` the stream goes on to the next block.
    """
    every = any(share.every_expert for share in shares)  # those that read one stream share their calibration
    with every_expert(context.module, wanted=every), context.hooks:
        feeds = _Feeds()
        collected = {share.entry.key: _statistics(share, context, stream, feeds) for share in shares}
        if advance and not (shares and isinstance(stream, PassStream)):
            stream.advance(context.index, feeds)
        elif shares:
            stream.observe(context.index, feeds)
    return collected


class _Feeds:
    """Statistics that hooks feed while several batches pass: each batch has parts of its own, which are added in their order,
    so that no bit depends on how many pass at once.
    """

    def __init__(self) -> None:
        self._totals: list[Any] = []
        self._makers: list[Callable[..., Any]] = []
        self._here = threading.local()

    def of(self, make: Callable[..., Any]) -> tuple[Any, _Feed]:
        """A statistic that `make` gives, and what feeds its part of the batch that passes, made by `make(first window)`."""
        self._totals.append(make())
        self._makers.append(make)
        return self._totals[-1], _Feed(self, len(self._totals) - 1)

    def part(self, place: int) -> Any:
        """The part of the batch that passes in this thread."""
        if place not in self._here.parts:
            self._here.parts[place] = self._makers[place](self._here.first)
        return self._here.parts[place]

    def begin(self, first: int) -> None:
        """A batch whose first window has this number passes in this thread."""
        self._here.first, self._here.parts = first, {}

    def seen(self) -> dict[int, Any]:
        """Its parts."""
        parts: dict[int, Any] = self._here.parts
        return parts

    def add(self, seen: dict[int, Any]) -> None:
        """Merge the parts of the next batch."""
        for place, part in seen.items():
            self._totals[place].merge(part)


@dataclass(frozen=True, slots=True)
class _Feed:
    """What hooks feed in the place of a statistic."""

    feeds: _Feeds
    place: int

    def update(self, x: Tensor) -> None:
        """Take rows of the batch that passes in this thread."""
        self.feeds.part(self.place).update(x)


def _statistics(share: Share, context: BlockContext, stream: Activations, feeds: _Feeds) -> Statistics:
    """A statistic for each module, one for all that read the same input, with hooks that feed it wherever its weight is used."""

    def pieces(x: Tensor) -> Iterator[Tensor]:
        return stream.padding.pieces(x)

    found: dict[tuple[str, Hashable], Any] = {}
    statistics = {}
    for shape in (shape for row in share.rows for shape in row.observed):
        source = context.fed_with(shape.name, share), share.modifier.alike(shape)
        if source not in found:
            found[source], feed = feeds.of(partial(context.statistic, share, shape))
            for module in dict.fromkeys(map(context.model.get_submodule, context.users(shape.name))):
                context.hooks.before(module, feeding(feed, shape.name, pieces))
        statistics[shape.name] = found[source]
    for tap in (tap for row in share.rows for tap in row.taps):
        statistics[tap.name], feed = feeds.of(partial(_listening, share, tap))
        feed_tap(context.hooks, context.model.get_submodule(tap.module), tap, feed, pieces)
    return statistics


def _listening(share: Share, tap: Tap, _: int = 0) -> Any:
    return share.modifier.listen(tap)
