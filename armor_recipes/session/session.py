"""Carry out a plan: for each stage one pass over the blocks, every step on statistics of its own inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from armor_recipes.calibration.inputs import InputSet
from armor_recipes.compute import give_back
from armor_recipes.compute.scratch import Scratch
from armor_recipes.events import LayerStarted, Observer, PhaseStarted, ignore_events, one_at_a_time
from armor_recipes.model.blocks import Stack, find_stacks
from armor_recipes.model.experts import readers_within_experts
from armor_recipes.model.hooks import Hooks
from armor_recipes.model.linears import linears_that_share
from armor_recipes.model.replay import Activations
from armor_recipes.model.store import InMemory
from armor_recipes.model.survey import Survey
from armor_recipes.modifiers import AnyModifier
from armor_recipes.modifiers.kinds.changes import Changes, ModuleResult
from armor_recipes.modifiers.kinds.contract import (
    BlockContext,
    Original,
    Row,
    Share,
    State,
    Statistics,
    Storage,
    StreamKey,
)
from armor_recipes.plan.plan import Plan
from armor_recipes.recipe import Recipe
from armor_recipes.recipe.schema import CalibrationSpec
from armor_recipes.session.commit import commit, commit_recorded, keep
from armor_recipes.session.gradients import stage_gradients
from armor_recipes.session.journal import Done, Journal
from armor_recipes.session.looking import look
from armor_recipes.session.observing import (
    Door,
    Opening,
    PassesResult,
    observe,
    original_of,
    stream_keys,
)


class Session:
    """Runs a plan on a model in memory, in place. A context manager: leaving it removes every hook.

    Args:
        model: a causal language model in its compute dtype; the planned modules' weights are replaced by Ŵ.
        tokens: calibration samples for each modifier's calibration spec.
        stored_dtype: the dtype of the checkpoint. Applied weights are what a loader makes of the stored tensors, bit for bit.
        keep_packed: keep factors for a packed checkpoint; else they are folded into plain weights.
        brought: what a compressed model comes with: factors and quantised layers, committed first.
        teacher: of a compressed model, the dense model's parameters where they differ from its own.
        scratch: where the model's weights are that lie in files; all that is kept then goes there.
        journal: what the steps are written to, and taken from where a run before has done them.
        seconds: CPU seconds that the rows of an entry are thought to take, by its key, by which the share that is done is told.
    """

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        model: nn.Module,
        modifiers: Mapping[str, AnyModifier[Any]],
        tokens: Mapping[CalibrationSpec, InputSet],
        *,
        stored_dtype: torch.dtype,
        keep_packed: bool = True,
        observer: Observer = ignore_events,
        brought: Changes | None = None,
        teacher: Mapping[str, Tensor] | None = None,
        journal: Journal | None = None,
        scratch: Scratch | None = None,
        seconds: Mapping[str, float] | None = None,
    ) -> None:
        self.recipe = recipe
        self.plan = plan
        self.model = model
        self.modifiers = modifiers
        self.tokens = tokens
        self.storage = Storage(stored_dtype, keep_packed)
        self.observer = one_at_a_time(observer)
        self.hooks = Hooks()
        self.state = State()
        self.weights = InMemory(model, stored_dtype=stored_dtype, teacher=teacher, scratch=scratch)
        self._scratch = scratch
        self._taught = teacher is not None
        self.stacks = find_stacks(model)
        self._sharing = linears_that_share(model)
        self._survey = Survey({}, {}, frozenset(), logits=True)
        self._readers: dict[str, str] = {}
        if brought is not None:
            commit(brought, self.weights, self.state)
        self._costs = _costs(plan, seconds or {})
        self._share = 0.0
        self._journal = Journal() if journal is None else journal
        self._place = "", ""

    def __enter__(self) -> Session:
        self.hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.hooks.__exit__(kind, error, trace)

    @property
    def results(self) -> dict[str, ModuleResult]:
        """By module, in the order in which they were first made."""
        return self.state.modules

    def section(self, name: str) -> list[Any]:
        """What was measured besides modules: the results of one section, in order."""
        return [result for result in self.state.results if result.section == name]

    def run(self) -> dict[str, ModuleResult]:
        """Run all stages; returns results by module, in the order in which they were made.

        Raises PlanError, before anything long, where calibration never reaches a module that is to learn from it.
        """
        training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                self._survey = look(
                    self.model,
                    self.stacks,
                    self._shares(),
                    self.tokens,
                    self.hooks,
                    moe=self.recipe.moe,
                    sharing=self._sharing,
                )
                self._readers = readers_within_experts(self._survey.readers)
                for stage in self.recipe.stages:
                    self._run_stage(stage)
        finally:
            self.model.train(training)
        return self.results

    def _shares(self, stage: str | None = None) -> list[Share]:
        """All that the plan has work for, with all its rows; of one stage, or of all."""
        return [
            Share(entry, self.modifiers[entry.key], self.plan.rows_of(entry.key))
            for entry in self.recipe.modifiers
            if stage in (None, entry.stage) and self.plan.takes(entry.key)
        ]

    def _run_stage(self, stage: str) -> None:
        shares, mark, stages = self._shares(stage), self._journal.mark, self.recipe.stages
        self.observer(PhaseStarted(f"stage {stage}"))
        self._place = stage, ""
        if stage == stages[0] or not self._wants_originals(stage):
            self.weights.keep_originals(self._wants_originals(stage))
        if mark is not None and stages.index(stage) < stages.index(mark.stage):
            self._replay(stage)
            return
        self._commit_gradients(stage, shares)
        give_back()
        work = {stack: found for stack in self._in_order() if (found := _inside(shares, stack))}
        past = self._past(stage, [stack.name for stack in work])
        openings = {stack: self._opening(stack, found) for stack, found in work.items() if stack.name not in past}
        # The dense streams of a stack need the stacks before it as they were.
        early = {stack: opening.open(["dense"]) for stack, opening in openings.items() if len(work) > 1}
        if any(door.passes for door in early.values()):
            self.weights.keep_originals(True)
        for stack, found in work.items():
            self._place = stage, stack.name
            if stack.name in past:
                self._replay(stage, stack.name)
            else:
                self._run_stack(stage, stack, found, openings[stack], early.get(stack))
        self._place = stage, ""
        give_back()
        for share in self._with_rows(shares, None):
            self.observer(PhaseStarted(f"{share.entry.name} ({stage})"))
            self._step([share], self._context(self.stacks.every[-1], None, {}))

    def _wants_originals(self, stage: str) -> bool:
        """Whether a modifier of this stage or a later one needs the dense model as a whole."""
        stages = self.recipe.stages
        left = stages[stages.index(stage) :]
        return any(self.modifiers[e.key].needs.dense == "model" for e in self.recipe.modifiers if e.stage in left)

    def _past(self, stage: str, stacks: Sequence[str]) -> Sequence[str]:
        """Those of a stage's stacks that a run before has done."""
        mark = self._journal.mark
        if mark is None or mark.stage != stage or mark.stack not in stacks:
            return ()
        return stacks[: stacks.index(mark.stack) + (mark.block is None)]

    def _replay(self, stage: str, stack: str | None = None, steps: int | None = None) -> None:
        """Commit recorded steps, as they are: those of a stage, of one of its stacks, or up to so many in the whole run."""
        while (key := self._journal.next_key(stage, stack, steps)) is not None:
            self._do(key, None)

    def _do(self, key: str, make: Callable[[], Changes] | None, streams: Iterable[Activations] = ()) -> None:
        """One step: what is recorded of it, else what `make` gives, which then is."""
        counted = list(streams)
        done = self._journal.replay(key)
        if done is not None:
            changes = done.changes
            commit_recorded(changes, self.weights, self.state)
            self._share = done.share
            for stream, count in zip(counted, done.passes, strict=False):
                stream.passes = count
        elif make is not None:
            changes = make()
            commit(changes, self.weights, self.state)
            passes = tuple(stream.passes for stream in counted)
            self._journal.record(self._place, Done(changes, self._share, passes))
        else:
            return
        if self._scratch is not None:
            # What is mapped from the journal lies at any byte, where products may round otherwise.
            computed_with = any(modifier.needs.factors for modifier in self.modifiers.values())
            keep(changes, self.state, self._scratch, {} if computed_with else self._journal.mapped(changes))

    def _in_order(self) -> list[Stack]:
        """The stacks in the order in which the forward pass comes to them."""
        return sorted(self.stacks.every, key=lambda stack: min(map(self._survey.place, stack.indices)))

    def _opening(self, stack: Stack, shares: Sequence[Share]) -> Opening:
        names = [shape.name for share in shares for row in share.rows for shape in row.observed]
        sharing: dict[int, list[int]] = {}
        for name in names:
            own = self.stacks.block_of(name)
            others = {self.stacks.block_of(user) for user in self._sharing.get(name, ())} - {own, None}
            if own is not None and others:
                sharing.setdefault(own, []).extend(sorted(number for number in others if number is not None))
        return Opening(
            self.model,
            self.stacks,
            stack,
            stream_keys(shares),
            self.tokens,
            sharing,
            lambda: self.weights.originals,
            self.hooks,
            taught=self._taught,
            keep=self.weights.keep,
        )

    def _run_stack(
        self, stage: str, stack: Stack, shares: Sequence[Share], opening: Opening, early: Door | None
    ) -> None:
        """All blocks of a stack that have work, or that lie before one that has."""
        door = opening.open(["compressed", "dense"] if early is None else ["compressed"])
        if door.passes and early is None and any(kind == "dense" for _, kind in door.streams):
            self.weights.keep_originals(True)
        merged = {**door.streams, **({} if early is None else early.streams)}
        streams = {key: merged[key] for key in opening.keys}
        reasons = [one.reason for one in (door, early) if one is not None and one.reason]
        working = {row.layer for share in shares for row in share.rows}
        last, total = max(working), len(self.stacks.names_to(stack.first))
        blocks = [block for block in stack.indices if block <= last]
        if reasons:
            self.observer(PhaseStarted(f"{stack.name}: statistics by passes of the whole model: {reasons[0]}"))
            blocks = sorted(working, key=self._survey.place)
        for block, following in pairwise([*self._left(blocks, stage, stack, streams), None]):
            assert block is not None
            self.observer(LayerStarted(stage, block, total))
            self._run_block(stack, block, shares, streams, last=last)
            if following is not None:
                self._journal.reach(self._place, following, list(streams.values()))
        if reasons:
            passes = sum(one.passes for one in (door, early) if one is not None)
            result = PassesResult(stage, stack.name, len(working), passes, reasons[0])
            key = f"{stage}/passes/{stack.name}"
            self._do(key, lambda: Changes(key, results=(result,)))
        self._journal.reach(self._place, None, [])

    def _left(
        self, blocks: Sequence[int], stage: str, stack: Stack, streams: Mapping[StreamKey, Activations]
    ) -> Sequence[int]:
        """The blocks that no run before has done; the model and its activations are then as they were at the door of the first."""
        mark = self._journal.mark
        if mark is None or (mark.stage, mark.stack) != (stage, stack.name) or mark.block not in blocks:
            return blocks
        self._journal.restore(mark, list(streams.values()))
        for stream in streams.values():
            stream.hidden[:] = map(self.weights.keep, stream.hidden)
        self._replay(stage, stack.name, mark.steps)
        return blocks[blocks.index(mark.block) :]

    def _with_rows(self, shares: Sequence[Share], block: int | None) -> list[Share]:
        """Those that have work in a block, with the rows of it."""
        found = [Share(s.entry, s.modifier, self.plan.of(s.entry.key, block)) for s in shares]
        return [share for share in found if share.rows]

    def _commit_gradients(self, stage: str, shares: Sequence[Share]) -> None:
        """What modifiers of the stage ask for of the model as the stage finds it."""
        if any(share.modifier.needs.gradients for share in shares):
            key, context = f"{stage}/gradients", self._context(self.stacks.every[0], None, {})
            self._do(key, lambda: Changes(key, gradients=stage_gradients(shares, self.plan.rows, context)))

    def _context(
        self,
        stack: Stack,
        block: int | None,
        streams: Mapping[StreamKey, Activations],
        statistics: Mapping[str, Statistics] | None = None,
        original: Original | None = None,
    ) -> BlockContext:
        return BlockContext(
            model=self.model,
            stacks=self.stacks,
            blocks=self._reached,
            stack=stack,
            block=block,
            weights=self.weights,
            state=self.state,
            storage=self.storage,
            streams=streams,
            tokens=self.tokens,
            statistics=statistics or {},
            readers=self._readers,
            layer_readers=self._survey.readers,
            moe=self.recipe.moe,
            sharing=self._sharing,
            original=original,
            keep_factors=any(modifier.needs.factors for modifier in self.modifiers.values()),
            hooks=self.hooks,
            observer=self.observer,
            progress=self._progress,
            reached=self._share_with,
            snapshot=self._journal.snapshot,
        )

    def _run_block(
        self, stack: Stack, block: int, shares: Sequence[Share], streams: Mapping[StreamKey, Activations], *, last: int
    ) -> None:
        """What comes first leaves the block's function; then dense streams pass it before anything in it changes; then each
        modifier observes, solves and commits in turn; then the compressed streams pass what the block has become.
        """
        working = self._with_rows(shares, block)
        for share in (share for share in working if share.modifier.needs.when == "before"):
            self._step([share], self._context(stack, block, streams))
        working = [share for share in working if share.modifier.needs.when == "in turn"]
        original = original_of(stack.block(block), block, working, streams)
        context = self._context(stack, block, streams, {}, original)
        statistics: dict[str, Statistics] = {}
        wanted = block < last or any(share.modifier.needs.dense == "outputs" for share in shares)
        for key in (key for key in streams if key[1] == "dense"):
            readers = [s for s in working if s.modifier.needs.feeds == "dense" and s.stream_key("dense") == key]
            statistics |= observe(streams[key], readers, context, advance=wanted)
        for turn in _turns(working):
            known = {share.entry.key: statistics.pop(share.entry.key, {}) for share in turn}
            context = self._context(stack, block, streams, known, original)
            self._step(turn, context)
        for key, stream in streams.items():
            if key[1] == "compressed" and block < last:
                stream.advance(block)

    def _observed(self, turn: Sequence[Share], context: BlockContext) -> BlockContext:
        """The context with the statistics of a turn that no pass before has taken."""
        (first, *others) = turn
        feeds = first.modifier.needs.feeds
        if others or feeds is None or not first.streams or context.statistics.get(first.entry.key):
            return context
        found = observe(context.stream(first, feeds), [first], context, advance=False)
        return self._context(context.stack, context.block, context.streams, found, context.original)

    def _step(self, turn: Sequence[Share], context: BlockContext) -> None:
        """Run the turn's steps, each on what those before it have become; what they are fed with is observed first.

        Not where all of them are recorded.
        """
        kind = turn[0].modifier.kind
        units = list(kind.units(turn, context))
        if not self._journal.knows([unit.key for unit in units]):
            context = self._observed(turn, context)
        for unit in units:
            self._do(unit.key, partial(kind.run, unit, context), context.streams.values())

    @property
    def _reached(self) -> tuple[int, ...]:
        """Blocks of lists that calibration reaches, in order; all where nothing was looked at."""
        numbers = [index for stack in self.stacks.all for index in stack.indices]
        return tuple(index for index in numbers if index in self._survey.blocks or not self._survey.blocks)

    def _progress(self, row: Row) -> float:
        self._share = self._share_with(row, 1.0)
        return self._share

    def _share_with(self, row: Row, part: float) -> float:
        return min(1.0, self._share + part * row.flops * self._costs.get(row.modifier, 0.0))


def _costs(plan: Plan, seconds: Mapping[str, float]) -> dict[str, float]:
    """By entry the share of all work that an operation of its rows is: by their seconds; alike where nothing takes any."""
    counted: dict[str, float] = {}
    for row in plan.rows:
        counted[row.modifier] = counted.get(row.modifier, 0.0) + row.flops
    counted = {key: flops for key, flops in counted.items() if flops}
    taken = {key: seconds.get(key, 0.0) for key in counted}
    if not any(taken.values()):
        taken = counted
    whole = sum(taken.values())
    return {key: taken[key] / flops / whole for key, flops in counted.items()}


def _inside(shares: Sequence[Share], stack: Stack) -> list[Share]:
    """Those that have work in a stack, with the rows of it."""
    found = [replace(s, rows=tuple(row for row in s.rows if row.layer in stack.indices)) for s in shares]
    return [share for share in found if share.rows]


def _turns(shares: Sequence[Share]) -> Iterator[list[Share]]:
    """The shares in order, those together that follow one another on other modules and in whose order nothing lies."""
    turn: list[Share] = []
    for share in shares:
        if turn and not _joins(share, turn):
            yield turn
            turn = []
        turn.append(share)
    if turn:
        yield turn


def _joins(share: Share, turn: Sequence[Share]) -> bool:
    needs, others = share.modifier.needs, turn[0].modifier.needs
    return (
        needs.joint
        and share.modifier.kind is turn[0].modifier.kind
        and needs.streams == others.streams
        and share.takes.isdisjoint({name for other in turn for name in other.takes})
    )
