"""Which modifier may follow which on the same modules: asked of the plan itself, two by two."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from itertools import permutations
from pathlib import Path

from transformers import PreTrainedModel

from armor_recipes.errors import PlanError
from armor_recipes.model.forms import linearise
from armor_recipes.modifiers import modifiers
from armor_recipes.modifiers.kinds.contract import entry_name
from armor_recipes.plan import Plan, make_plan
from armor_recipes.run.job import read_recipe
from tests.conformance.cases import COLUMNS, fields, mapping, model_of
from tests.conformance.checks import plain

#: What is put around two modifiers that need factors before, or pruning or quantising after them: one after the other until a plan
#: is made.
CONTEXTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    ((), ()),
    (("ARMORModifier",), ()),
    ((), ("NoWagModifier",)),
    ((), ("ARMORModifier",)),
    ((), ("QuantizationModifier",)),
)


class Orders:
    """Plans on one model, whose weights nobody asks for."""

    @cached_property
    def model(self) -> PreTrainedModel:
        """All forms linear."""
        model = model_of(COLUMNS[0])
        linearise(model)
        return model

    def plan(self, *names: str) -> Plan:
        """Of modifiers in this order on the same modules. Raises PlanError."""
        group = {name: fields(name, COLUMNS[0]) for name in names}
        recipe = read_recipe(mapping(group, Path("model"), Path("out")))
        known = modifiers()
        instances = {entry.key: known[entry.kind](entry.config) for entry in recipe.modifiers}
        return make_plan(recipe, self.model, instances, itemsize=2)

    def answer(self, first: str, then: str) -> dict[str, str]:
        """Whether one may follow the other: `refused` with the reason, `poor` with the figure, or nothing to say."""
        refused: list[str] = []
        for before, after in CONTEXTS:
            if {first, then} & {*before, *after}:
                continue
            try:
                plan = self.plan(*before, first, then, *after)
            except PlanError as error:
                refused += str(error).split("\n")
                continue
            ours = [one.text for one in plan.warnings if entry_name(one.modifier) == then]
            poor = [text for text in ours if text.startswith(f"after {first} ")]
            return {"poor": plain(poor[0]).partition(": ")[2]} if poor else {}
        reasons = [plain(reason) for reason in refused]
        own = [reason for reason in reasons if reason.startswith(f"{then}: ")]  # not that of what was put around them
        return {"refused": (own or reasons)[0].partition(": ")[2]}


def orders() -> dict[str, dict[str, dict[str, str]]]:
    """By the first modifier and the one after it, what the plan says against it."""
    asked = Orders()
    found: dict[str, dict[str, dict[str, str]]] = {name: {} for name in modifiers()}
    for first, then in pairs():
        found[first][then] = asked.answer(first, then)
    return found


def pairs() -> Iterator[tuple[str, str]]:
    """All ordered pairs of different modifiers."""
    return permutations(modifiers(), 2)
