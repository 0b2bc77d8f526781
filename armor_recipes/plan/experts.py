"""What a plan says of the experts of mixtures: how many of them each modifier takes, and how many tokens each can expect."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from armor_recipes.model.experts import Expert, can_call_every_expert, expert_of
from armor_recipes.model.facts import ModelFacts
from armor_recipes.modifiers import AnyModifier
from armor_recipes.modifiers.base import ModuleShape, Statistic
from armor_recipes.modifiers.kinds.contract import Row, calibration_tokens, entry_name, once
from armor_recipes.modifiers.kinds.experts import minimum_tokens
from armor_recipes.recipe import CalibrationSpec, ModifierEntry, Recipe

Modifiers = Mapping[str, AnyModifier[Any]]


@dataclass(frozen=True, slots=True)
class ExpertsPlan:
    """The experts of one layer that one modifier is calibrated on.

    `experts` of the `total` of the layer are targeted. `expected_tokens` is the mean number of calibration tokens that reach one,
    rounded down; None where the model's config does not say how many experts a token takes. `minimum_tokens` are those that the
    recipe asks for, the most of any of an expert's modules, and `below` is what it says of experts that see fewer.
    """

    modifier: str
    layer: str
    experts: int
    total: int
    expected_tokens: int | None
    minimum_tokens: int
    below: str

    @property
    def too_few(self) -> bool:
        """Whether even an expert like the mean is below the minimum."""
        return self.expected_tokens is not None and self.expected_tokens < self.minimum_tokens


def plan_experts(
    recipe: Recipe, model: nn.Module, facts: ModelFacts, rows: Sequence[Row], modifiers: Modifiers
) -> tuple[ExpertsPlan, ...]:
    """For each modifier that is calibrated and layer of experts that it takes some of, in the order of the rows."""
    specs = {entry.key: entry.config.calibration for entry in recipe.modifiers}
    sizes = _Sizes(modifiers)
    taken: dict[tuple[str, str], set[int]] = {}
    least: dict[tuple[str, str], int] = {}
    for row, shape, expert in _observed(rows):
        place = row.modifier, expert.layer
        taken.setdefault(place, set()).add(expert.number)
        least[place] = max(minimum_tokens(recipe.moe, sizes.of(row, shape)), least.get(place, 0))
    totals = expert_totals(model) if taken else {}
    found = []
    for (key, layer), numbers in taken.items():
        spec = specs[key]
        if spec is not None:
            total = totals.get(layer, len(numbers))
            tokens = _expected(spec, facts.experts_per_token, total)
            found.append(ExpertsPlan(key, layer, len(numbers), total, tokens, least[key, layer], recipe.moe.below))
    return tuple(found)


def expert_problems(recipe: Recipe, model: nn.Module, rows: Sequence[Row], modifiers: Modifiers) -> list[str]:
    """What of a calibration cannot be done with experts, as messages, one for each modifier and reason."""
    entries = {entry.key: entry for entry in recipe.modifiers}
    found: dict[tuple[str, str], list[str]] = {}
    for row, shape, _ in _observed(rows):
        problem = _problem(entries[row.modifier], model, shape.name, modifiers[row.modifier])
        if problem:
            found.setdefault((row.modifier, problem), []).append(shape.name)
    return [f"{entries[key].where}: {entry_name(key)}: {once(text, names)}" for (key, text), names in found.items()]


def expert_notes(recipe: Recipe, experts: Sequence[ExpertsPlan]) -> list[str]:
    """What a recipe says of experts to no effect, as sentences."""
    if experts:
        return []
    specs = [entry.config.calibration for entry in recipe.modifiers]
    said = ["`calibration.experts: all`"] if any(spec is not None and spec.experts == "all" for spec in specs) else []
    said += ["`moe`"] if "moe" in recipe.resolved else []
    return [f"{name} changes nothing: no module that is calibrated belongs to an expert" for name in said]


def held_bytes(rows: Sequence[Row], modifiers: Modifiers) -> int:
    """Memory of the statistics of the experts of the block that needs most, since all of a block's are held at once.

    Modules of an expert that are as wide count once: they read one tensor. With `experts: all` it is less.
    """
    sizes = _Sizes(modifiers)
    held: dict[tuple[str, int | None, str], dict[tuple[str, int, int], int]] = {}
    for row, shape, expert in _observed(rows):
        statistic = sizes.of(row, shape)
        size = getattr(statistic, "full_bytes", 0)  # of `KnowsItsSize`; asking a protocol for each row takes seconds
        held.setdefault((row.stage, row.layer, row.modifier), {})[expert.layer, expert.number, shape.d_in] = size
    return max((sum(sizes.values()) for sizes in held.values()), default=0)


def _problem(entry: ModifierEntry, model: nn.Module, name: str, modifier: AnyModifier[Any]) -> str:
    spec = entry.config.calibration
    if spec is None:
        return ""
    if spec.experts == "routed" and modifier.needs.dense == "block":
        return (
            f"{modifier.needs.because} "
            "compares what {} reads in two models, whose routers give it other tokens: set "
            "`calibration.experts: all`, or choose another `propagate` for it"
        )
    if spec.experts == "all" and not any(can_call_every_expert(module) for module in _above(model, name)):
        return "`calibration.experts: all`: {} is never given other tokens than its own by the model: set `experts: routed`"
    return ""


def _above(model: nn.Module, name: str) -> Iterator[nn.Module]:
    """The modules that hold the module of that name."""
    module = model
    for part in name.split("."):
        yield module
        module = module.get_submodule(part)


def _observed(rows: Sequence[Row]) -> Iterator[tuple[Row, ModuleShape, Expert]]:
    """Rows that observe modules of experts, with each such module."""
    for row in rows:
        for shape in row.observed:
            expert = expert_of(shape.name)
            if expert is not None:
                yield row, shape, expert


class _Sizes:
    """Statistics that have seen nothing, one for each modifier and shape: tens of thousands of experts have few shapes."""

    def __init__(self, modifiers: Modifiers) -> None:
        self._modifiers: Mapping[str, Any] = modifiers
        self._made: dict[tuple[str, int, int], Statistic] = {}

    def of(self, row: Row, shape: ModuleShape) -> Statistic:
        """One of the row's modifier."""
        key = row.modifier, shape.d_out, shape.d_in
        if key not in self._made:
            self._made[key] = self._modifiers[row.modifier].statistic(shape)
        return self._made[key]


def expert_totals(model: nn.Module) -> dict[str, int]:
    """How many experts each layer has."""
    numbers: dict[str, set[int]] = {}
    for name, module in model.named_modules():
        expert = expert_of(name) if isinstance(module, nn.Linear) else None
        if expert is not None:
            numbers.setdefault(expert.layer, set()).add(expert.number)
    return {layer: len(found) for layer, found in numbers.items()}


def _expected(spec: CalibrationSpec, per_token: int | None, total: int) -> int | None:
    tokens = calibration_tokens(spec)
    if spec.experts == "all":
        return tokens
    return None if per_token is None else tokens * min(per_token, total) // total
