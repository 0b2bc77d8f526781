"""Experts that too few calibration tokens reach: what a recipe's `moe` says of them, for every kind of modifier."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import ClassVar

from armor_recipes.calibration.statistics import ENOUGH_TOKENS
from armor_recipes.errors import NumericalError
from armor_recipes.model.experts import expert_of
from armor_recipes.modifiers.base import ModuleShape, Statistic
from armor_recipes.modifiers.kinds.changes import StepResult
from armor_recipes.modifiers.kinds.contract import BlockContext, Share, State, Statistics, located
from armor_recipes.recipe.schema import MoeSpec

#: Experts that an error names one by one.
_NAMED = 8


@dataclass(frozen=True, slots=True)
class ExpertBelow(StepResult):
    """A module of an expert that fewer calibration tokens reached than the recipe asks for.

    `done` is what the recipe says of it: `layer-moment`, or `skip`, after which the module is what it was before. `used` are the
    tokens of the statistic that took the place of its own, 0 where it was left alone.
    """

    section: ClassVar[str] = "experts_below"

    modifier: str
    name: str
    tokens: int
    minimum: int
    done: str
    used: int
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class Fed:
    """What a share's modules are calibrated on.

    Attributes:
        statistics: by module, of those that are worked on.
        tokens: rows that each module itself has seen.
        below: what is told of experts that have seen too few.
    """

    statistics: Statistics
    tokens: Mapping[str, int]
    below: tuple[ExpertBelow, ...] = ()

    @property
    def skipped(self) -> frozenset[str]:
        """Modules that are left as they are."""
        return frozenset(one.name for one in self.below if one.done == "skip")


def fed(share: Share, shapes: Sequence[ModuleShape], statistics: Statistics, context: BlockContext) -> Fed:
    """The modules' statistics after what the recipe says of experts with too few tokens.

    Raises NumericalError, naming the experts, where it says `below: error`.
    """
    tokens = {shape.name: statistics[shape.name].tokens for shape in shapes if shape.name in statistics}
    moe = context.moe
    least = {name: minimum_tokens(moe, statistics[name]) for name in tokens if expert_of(name)}
    poor = [shape for shape in shapes if shape.name in least and tokens[shape.name] < least[shape.name]]
    if not poor:
        return Fed(statistics, tokens)
    if moe.below == "error":
        _refuse(share, shapes, poor, Fed(statistics, tokens), context)
    instead = _of_layers(share, shapes, poor, statistics, context) if moe.below == "layer-moment" else {}
    below = tuple(
        ExpertBelow(
            modifier=share.entry.key,
            name=shape.name,
            tokens=tokens[shape.name],
            minimum=least[shape.name],
            done=moe.below,
            used=instead[shape.name].tokens if instead else 0,
        )
        for shape in poor
    )
    return Fed({**statistics, **instead}, tokens, below)


def minimum_tokens(moe: MoeSpec, statistic: Statistic | None = None) -> int:
    """How many tokens an expert's module is to see, which of `auto` its statistic says."""
    if moe.minimum_tokens != "auto":
        return moe.minimum_tokens
    found: int = getattr(statistic, "enough_tokens", ENOUGH_TOKENS)  # of `KnowsItsSize`
    return found


def left_alone(state: State) -> set[str]:
    """Modules that have no factors because they were skipped where those are made."""
    below = (result for result in state.results if isinstance(result, ExpertBelow) and result.done == "skip")
    return {result.name for result in below if result.name not in state.factors}


def _of_layers(
    share: Share,
    shapes: Sequence[ModuleShape],
    poor: Sequence[ModuleShape],
    statistics: Statistics,
    context: BlockContext,
) -> dict[str, Statistic]:
    """For each of these modules what the same module of all experts of its layer has seen, in the model's order.

    Modules whose statistics were the same ones share the new one, too.
    """
    peers: dict[tuple[str, str, int], list[ModuleShape]] = {}
    for key, shape in _keyed(shapes):
        peers.setdefault(key, []).append(shape)
    made: dict[tuple[int, ...], Statistic] = {}
    found = {}
    for key, shape in _keyed(poor):
        parts = list({id(statistics[peer.name]): statistics[peer.name] for peer in peers[key]}.values())
        which = tuple(map(id, parts))
        if which not in made:
            made[which] = _merged(share, peers[key][0], parts, context)
        found[shape.name] = made[which]
    return found


def _keyed(shapes: Sequence[ModuleShape]) -> Iterator[tuple[tuple[str, str, int], ModuleShape]]:
    """Modules of experts by their layer, what they are called in each expert, and their width."""
    for shape in shapes:
        expert = expert_of(shape.name)
        if expert is not None:
            yield (expert.layer, expert.part, shape.d_in), shape


def _merged(share: Share, first: ModuleShape, parts: Sequence[Statistic], context: BlockContext) -> Statistic:
    """One statistic of all that these have seen, under the first module's name; they stay as they are."""
    total = context.statistic(share, first)
    for statistic in parts:
        part = context.statistic(share, first)
        part.load_state(replace(statistic.state(), module=first.name))
        total.merge(part)
    return total


def _refuse(
    share: Share, shapes: Sequence[ModuleShape], poor: Sequence[ModuleShape], given: Fed, context: BlockContext
) -> None:
    """Raise NumericalError with the experts of the first layer that has such, and how many windows would do."""
    layer = next(key[0] for key, _ in _keyed(poor))
    total = {number for number, _ in _numbered(shapes, layer)}
    fewest: dict[int, int] = {}
    wanted: dict[int, int] = {}
    for number, name in _numbered(poor, layer):
        fewest[number] = min(given.tokens[name], fewest.get(number, given.tokens[name]))
        wanted[number] = max(minimum_tokens(context.moe, given.statistics[name]), wanted.get(number, 0))
    named = ", ".join(f"{number} ({count})" for number, count in sorted(fewest.items())[:_NAMED])
    more = f" and {len(fewest) - _NAMED} more" if len(fewest) > _NAMED else ""
    with located(share.entry, layer):
        raise NumericalError(
            f"{len(fewest)} of {len(total)} experts of {layer} see fewer calibration tokens than `moe.minimum_tokens` asks for "
            f"({max(wanted.values())}), by number (tokens): {named}{more}. {_enough(share, fewest, wanted, context)}, lower "
            "`moe.minimum_tokens`, set `calibration.experts: all`, or set `moe.below` to `layer-moment` or `skip`"
        )


def _numbered(shapes: Sequence[ModuleShape], layer: str) -> Iterator[tuple[int, str]]:
    """The modules of a layer's experts, with the experts' numbers."""
    for shape in shapes:
        expert = expert_of(shape.name)
        if expert is not None and expert.layer == layer:
            yield expert.number, shape.name


def _enough(share: Share, fewest: Mapping[int, int], wanted: Mapping[int, int], context: BlockContext) -> str:
    """How many windows would be enough if tokens went on to be routed as they were."""
    spec = share.entry.config.calibration
    assert spec is not None
    windows = len(context.tokens[spec])
    if not min(fewest.values()):
        return f"Raise `calibration.samples` ({windows} windows reach some experts with no token at all)"
    enough = max(ceil(windows * wanted[number] / count) for number, count in fewest.items())
    return f"Raise `calibration.samples` to {enough} (there were {windows} windows)"
