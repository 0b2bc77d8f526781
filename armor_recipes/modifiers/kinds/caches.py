"""Keys and values of attention on their way into the cache: rows, and what a step makes of what was observed of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from armor_recipes.checkpoint.quantized import cache_args, cache_tensors, described_cache
from armor_recipes.errors import PlanError
from armor_recipes.model.cache import cache_argument
from armor_recipes.modifiers.base import Tap
from armor_recipes.modifiers.kinds.changes import Changes, StepResult
from armor_recipes.modifiers.kinds.contract import BlockContext, Overridden, Planning, Row, Share, located


@dataclass(frozen=True, slots=True)
class CachePlan(Row):
    """An attention module whose keys and values are quantised. `scheme` is how, as JSON of compressed-tensors' args; `widths` are
    the numbers of a token's keys and values, 1 where shapes do not tell them.
    """

    section: ClassVar[str] = "kv_cache"

    name: str
    modifier: str
    stage: str
    layer: int
    scheme: str
    widths: tuple[int, int]
    flops: float = 0.0
    peak_bytes: int = 0

    @property
    def taps(self) -> tuple[Tap, ...]:
        """Its keys and its values, where they have static scales."""
        if not cache_tensors(self.scheme):
            return ()
        return Tap(self.name, "keys", self.widths[0]), Tap(self.name, "values", self.widths[1])

    @property
    def described(self) -> str:
        """In words."""
        return f"keys and values {described_cache(self.scheme)}"


@dataclass(frozen=True, slots=True)
class CacheResult(StepResult):
    """How an attention module's keys and values are quantised, and on how many tokens that was chosen."""

    section: ClassVar[str] = "kv_cache"

    modifier: str
    name: str
    scheme: str
    tokens: int
    seconds: float = field(default=0.0, compare=False)


def plan_caches(planning: Planning, scheme: str | None) -> tuple[CachePlan, ...]:
    """A row for each attention module of the model. Raises PlanError where there is none, or static scales have no data."""
    if scheme is None:
        return ()
    args = cache_args(scheme)
    if args.dynamic is not True and args.strategy not in ("tensor", "attn_head"):
        raise PlanError(f"kv_cache_scheme: strategy {args.strategy} is none of a cache: take tensor, or attn_head")
    if args.dynamic is not True and planning.entry.config.calibration is None:
        raise PlanError(
            "kv_cache_scheme: scales of keys and values come from calibration inputs, and the recipe has none: add a top-level "
            "`calibration`, say `calibration: {dataset: builtin:pydoc, samples: 64, sequence_length: 256}`"
        )
    found = [(name, module) for name, module in planning.model.named_modules() if cache_argument(module) is not None]
    rows = [
        CachePlan(name, planning.entry.key, planning.entry.stage, layer, scheme, _widths(module))
        for name, module in found
        if (layer := planning.stacks.block_of(name)) is not None
    ]
    if not rows:
        raise PlanError(
            f"kv_cache_scheme: {type(planning.model).__name__} has no attention module with projections of keys or values and a "
            "cache inside its layers: leave it out"
        )
    return tuple(rows)


def replaced_caches(rows: Sequence[CachePlan], planning: Planning) -> Iterator[tuple[CachePlan, Overridden]]:
    """Rows of entries before for the same modules, which count no longer."""
    names = {row.name for row in rows}
    for row in planning.made(CachePlan.section):
        if row.name in names:
            yield row, Overridden(row.name, row.described, row.modifier, planning.entry.key)


def cache_changes(share: Share, key: str, context: BlockContext) -> Changes:
    """The scales of a block's keys and values. Raises NumericalError where a statistic saw nothing."""
    statistics: Any = context.statistics.get(share.entry.key, {})
    modifier: Any = share.modifier
    caches, results = {}, []
    for row in share.rows:
        seen = [statistics[tap.name] for tap in row.taps] or [None, None]
        with located(share.entry, row.name):
            caches[row.name] = modifier.cached(row.scheme, *seen, context.storage.dtype)
        tokens = seen[0].tokens if row.taps else 0
        results.append(CacheResult(share.entry.key, row.name, described_cache(row.scheme), tokens))
    return Changes(step=key, caches=caches, results=tuple(results))


def _widths(module: Any) -> tuple[int, int]:
    keys, values = (getattr(getattr(module, name, None), "out_features", 1) for name in ("k_proj", "v_proj"))
    return keys, values
