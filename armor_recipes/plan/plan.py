"""The plan: a value that is the same for the same recipe and shapes on every machine. A run executes it and no more."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from armor_recipes.modifiers.kinds.caches import CachePlan
from armor_recipes.modifiers.kinds.contract import Overridden, Row, Skipped
from armor_recipes.modifiers.kinds.module import ModulePlan
from armor_recipes.modifiers.kinds.rearranger import RearrangePlan
from armor_recipes.modifiers.kinds.refiner import RefinePlan
from armor_recipes.plan.experts import ExpertsPlan


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the plan, exact. Bytes are of weights as stored; `untouched_bytes` of those that nothing changes."""

    modules: int
    bytes_before: int
    bytes_after: int
    factor_bytes: int
    untouched_bytes: int


@dataclass(frozen=True, slots=True)
class PlanWarning:
    """What an entry asks for in vain, or what is legal and was measured to be poor. `modifier` is the entry's key."""

    modifier: str
    text: str


@dataclass(frozen=True, slots=True)
class Plan:
    """All rows of work, by section, stage, block and modifier order; `ignored` are linear modules that an `ignore` held back.

    `layers` are the names of the blocks, by their numbers; `skipped` are targeted modules that an entry with `unfit: skip` cannot
    change, with the reason; `given` are rows of what came packed or quantised with the model, which no entry made;
    `overridden` is what was asked for modules and is not done, because another entry or group counts;
    `notes` are sentences on what comes out otherwise than it went in; `forms` are the names of modules
    that become linear layers (fused experts, transposed layers), some of which are in `rows`; `untied` are
    output layers that get a weight of their own, where they have that of the embeddings;
    `experts` is what the experts of mixtures are calibrated on; `warnings` tell what is asked for in vain or was measured to be
    poor.
    Plans are equal, and have equal hashes, where they say the same.
    """

    model: str
    layers: tuple[str, ...]
    rows: tuple[Row, ...]
    ignored: tuple[str, ...]
    totals: Totals
    notes: tuple[str, ...] = ()
    forms: tuple[str, ...] = ()
    untied: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    overridden: tuple[Overridden, ...] = ()
    experts: tuple[ExpertsPlan, ...] = ()
    warnings: tuple[PlanWarning, ...] = ()
    given: tuple[ModulePlan, ...] = ()
    _by_place: Mapping[tuple[str, int | None], tuple[Row, ...]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        found: dict[tuple[str, int | None], list[Row]] = {}
        for row in self.rows:
            found.setdefault((row.modifier, row.layer), []).append(row)
        object.__setattr__(self, "_by_place", {place: tuple(rows) for place, rows in found.items()})

    def section(self, name: str) -> tuple[Any, ...]:
        """The rows of one section, in order."""
        return _section(self.rows, name)

    @property
    def bytes_given(self) -> int:
        """Of the weights in `totals`, the bytes that they take in the model as it comes; those of dense ones, if it is."""
        return self.totals.bytes_before - sum(row.bytes_before - row.bytes_after for row in self.given)

    @property
    def modules(self) -> tuple[ModulePlan, ...]:
        """What is done to single modules."""
        return self.section(ModulePlan.section)

    @property
    def stored(self) -> dict[str, ModulePlan]:
        """How each module ends, by name: its last row."""
        return last_of_each((*self.given, *self.rows))

    @property
    def rearrangements(self) -> tuple[RearrangePlan, ...]:
        """What is reordered."""
        return self.section(RearrangePlan.section)

    @property
    def refinements(self) -> tuple[RefinePlan, ...]:
        """What is trained."""
        return self.section(RefinePlan.section)

    @property
    def caches(self) -> tuple[CachePlan, ...]:
        """Attention modules whose keys and values are quantised."""
        return self.section(CachePlan.section)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Weight shapes `(d_out, d_in)` of all modules that are changed, by name."""
        return {name: shape for row in self.rows for name, shape in row.shapes.items()}

    def last_block(self, stage: str) -> int:
        """The last block in which a stage has anything to do; -1 where there is none."""
        return max((row.layer for row in self.rows if row.stage == stage and row.layer is not None), default=-1)

    def of(self, modifier: str, block: int | None) -> tuple[Row, ...]:
        """What an entry does in a block, or at the end of its stage (None), in the model's order."""
        return self._by_place.get((modifier, block), ())

    def rows_of(self, modifier: str) -> tuple[Row, ...]:
        """All that an entry does."""
        return tuple(row for row in self.rows if row.modifier == modifier)

    def takes(self, modifier: str) -> bool:
        """Whether the entry has anything to do."""
        return any(row.modifier == modifier for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--plan --json`: a list for each section."""
        sections: dict[str, list[Any]] = {kind.section: [] for kind in (ModulePlan, RefinePlan, RearrangePlan)}
        for row in self.rows:
            sections.setdefault(row.section, []).append(row.to_dict())
        skipped = [asdict(one) for one in self.skipped]
        others = {
            "ignored": list(self.ignored),
            "totals": asdict(self.totals),
            "notes": list(self.notes),
            "skipped": skipped,
        }
        forms = {"linear_forms": list(self.forms)} if self.forms else {}
        forms |= {"untied": list(self.untied)} if self.untied else {}
        told: dict[str, tuple[Any, ...]] = {
            "experts": self.experts,
            "overridden": self.overridden,
            "warnings": self.warnings,
        }
        rare = {name: [asdict(one) for one in rows] for name, rows in told.items() if rows}
        rare |= {"given": [row.to_dict() for row in self.given]} if self.given else {}
        return {"model": self.model, "layers": list(self.layers), **sections, **others, **forms, **rare}

    @property
    def sha256(self) -> str:
        """Of the plan as plain data: the same in every process."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


def last_of_each(rows: Sequence[Row]) -> dict[str, ModulePlan]:
    """The last row of each module, which says how it is stored."""
    return {name: row for row in _section(rows, ModulePlan.section) for name in row.takes}


def _section(rows: Sequence[Row], name: str) -> tuple[Any, ...]:
    return tuple(row for row in rows if row.section == name)
