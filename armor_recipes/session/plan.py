"""The plan: every target resolved, checked and costed on shapes alone, before any weight is read. A run executes it and no more."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from torch import nn

from armor_recipes.checkpoint.config import LayerSpec
from armor_recipes.errors import PlanError
from armor_recipes.modifiers import AnyModifier, FactorModifier, Modifier, ModuleShape, Rearranger, Refiner
from armor_recipes.modifiers.base import CoreType, Estimate, RefineUnit, StoredAs
from armor_recipes.recipe import ModifierEntry, Recipe
from armor_recipes.session.estimate import bytes_at_once, calibration_tokens, estimate_peak_bytes, estimate_seconds
from armor_recipes.session.layers import DecoderLayers, find_decoder_layers
from armor_recipes.session.rearranging import RearrangePlan, chain_conflicts, plan_chains
from armor_recipes.session.serving import PackedModule, serve_problems
from armor_recipes.session.targets import resolve_targets, tied_to


@dataclass(frozen=True, slots=True)
class ModulePlan:
    """What will happen to one module. `modifier` is an entry's key, `layer` counts from 0.

    `bytes_before` are those of the dense weight, `bytes_after` those of the weight as stored if nothing else follows.
    `stored_as`: `packed` (core and factors) or `dense` (a plain weight: masked, or the product A·S·B of what cannot be packed).
    `core` is what a packed core's kept values are. A module has a row for each modifier that changes it, the last one counts.
    """

    name: str
    modifier: str
    stage: str
    layer: int
    d_out: int
    d_in: int
    block_size: tuple[int, int] | None
    blocks: tuple[int, int] | None
    bytes_before: int
    bytes_after: int
    factor_bytes: int
    flops: float
    peak_bytes: int
    stored_as: StoredAs = "dense"
    core: CoreType = "float"

    @property
    def overhead_percent(self) -> float:
        """Bytes of A and B as a percentage of the dense weight's."""
        return 100.0 * self.factor_bytes / self.bytes_before


@dataclass(frozen=True, slots=True)
class RefinePlan:
    """What one refiner will train at once: the factors of `modules`, in decoder layer `layer`, or in the whole model (None)."""

    modifier: str
    stage: str
    unit: str
    layer: int | None
    modules: tuple[str, ...]
    tokens: int
    flops: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over the plan. `peak_bytes` and `seconds` (without evaluation) are estimates for this machine; the rest is exact."""

    modules: int
    bytes_before: int
    bytes_after: int
    factor_bytes: int
    untouched_bytes: int
    peak_bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Plan:
    """Modules by stage, layer and modifier order; `ignored` are linear modules that an `ignore` held back.

    `notes` are sentences on what comes out otherwise than it went in.
    """

    model: str
    layers: tuple[str, ...]
    modules: tuple[ModulePlan, ...]
    refinements: tuple[RefinePlan, ...]
    ignored: tuple[str, ...]
    totals: Totals
    rearrangements: tuple[RearrangePlan, ...] = ()
    notes: tuple[str, ...] = ()

    def takes(self, modifier: str) -> bool:
        """Whether the modifier has anything to do."""
        return any(row.modifier == modifier for row in self.work)

    @property
    def work(self) -> tuple[ModulePlan | RefinePlan | RearrangePlan, ...]:
        """Everything that is to be done: modules solved, channels reordered, factors trained."""
        return (*self.modules, *self.rearrangements, *self.refinements)

    @property
    def flops(self) -> float:
        """Work of all solves, trainings and reorderings, in floating-point operations."""
        return sum(row.flops for row in self.work)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Weight shapes `(d_out, d_in)` of all modules that are changed, by name."""
        chains = [row.chain for row in self.rearrangements]
        found = {m.name: (m.d_out, m.d_in) for chain in chains for m in (chain.consumer, *chain.producers)}
        return found | {m.name: (m.d_out, m.d_in) for m in self.modules}

    def last_layer(self, stage: str) -> int:
        """The last layer in which a stage solves or reorders modules; -1 where there is none."""
        rows: list[ModulePlan | RearrangePlan] = [*self.modules, *self.rearrangements]
        return max((row.layer for row in rows if row.stage == stage), default=-1)

    def chains(self, modifier: str, layer: int) -> tuple[RearrangePlan, ...]:
        """What a rearranger reorders in a layer, in the model's order."""
        return tuple(row for row in self.rearrangements if (row.modifier, row.layer) == (modifier, layer))

    def refinements_of(self, modifier: str, layer: int | None) -> tuple[RefinePlan, ...]:
        """What a refiner trains in a layer, or at the end of its stage (None)."""
        return tuple(row for row in self.refinements if (row.modifier, row.layer) == (modifier, layer))

    def for_layer(self, stage: str, layer: int, modifier: str) -> tuple[ModulePlan, ...]:
        """The modules that a modifier takes in one layer, in the model's order."""
        return tuple(m for m in self.modules if (m.stage, m.layer, m.modifier) == (stage, layer, modifier))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for `--plan --json`."""
        data = asdict(self)
        for row, module in zip(data["modules"], self.modules, strict=True):
            row["overhead_percent"] = round(module.overhead_percent, 3)
        return data


def make_plan(recipe: Recipe, model: nn.Module, modifiers: Mapping[str, AnyModifier[Any]], *, itemsize: int) -> Plan:
    """Resolve, check and cost the recipe on a model (meta tensors will do). All problems are raised at once as PlanError.

    `modifiers` holds an instance for each entry's key; `itemsize` is the bytes of a stored weight value.
    """
    layers = find_decoder_layers(model)
    problems: list[str] = []
    rows: list[ModulePlan] = []
    refinements: list[RefinePlan] = []
    chains: list[RearrangePlan] = []
    ignored: dict[str, None] = {}
    for entry in recipe.modifiers:
        modifier = modifiers[entry.key]
        try:
            matched = resolve_targets(model, entry.config)
            if isinstance(modifier, Refiner):
                refinements += _plan_refiner(entry, modifier, model, layers, rows, matched.names)
            elif isinstance(modifier, Rearranger):
                _check_first(entry, recipe, modifiers)
                chains += plan_chains(entry, modifier, model, layers, matched.names, itemsize=itemsize)
                _check_untouched(chains, rows)
            elif isinstance(modifier, FactorModifier):
                _check_factor_modifier(entry, recipe, modifiers)
                rows += _plan_modules(
                    entry, matched.names, partial(_plan_change, entry, modifier, tuple(rows)), problems
                )
            else:
                assert isinstance(modifier, Modifier)
                ignored.update((name, None) for name in matched.ignored)
                make = partial(_plan_module, entry, modifier, model, layers, itemsize)
                rows += _plan_modules(entry, matched.names, make, problems)
        except PlanError as error:
            problems.append(f"{entry.where}: {entry.name}: {error}")
    problems += _conflicts(recipe, rows, modifiers) + _late_dense(recipe, modifiers)
    problems += chain_conflicts({entry.key: entry.where for entry in recipe.modifiers}, chains)
    problems += _unservable(recipe, model, layers, rows)
    if problems:
        raise PlanError("\n".join(problems))
    order = {entry.key: i for i, entry in enumerate(recipe.modifiers)}
    stages = {stage: i for i, stage in enumerate(recipe.stages)}
    rows.sort(key=lambda m: (stages[m.stage], m.layer, order[m.modifier]))
    touched = {m.name for m in rows}
    return Plan(
        model=recipe.model.id,
        layers=layers.names,
        modules=tuple(rows),
        refinements=tuple(refinements),
        ignored=tuple(name for name in ignored if name not in touched),
        totals=_totals(recipe, rows, (*refinements, *chains), model, modifiers, itemsize),
        rearrangements=tuple(chains),
    )


def _plan_modules(
    entry: ModifierEntry, names: Sequence[str], make: Callable[[str], ModulePlan], problems: list[str]
) -> list[ModulePlan]:
    """What `make` plans for each module; what it refuses is added to `problems`."""
    rows: list[ModulePlan] = []
    refused: dict[str, list[str]] = {}
    for name in names:
        try:
            rows.append(make(name))
        except PlanError as error:
            refused.setdefault(str(error).replace(name, "{}"), []).append(name)
    problems += [f"{entry.where}: {entry.name}: {_once(text, found)}" for text, found in refused.items()]
    return rows


def _check_first(entry: ModifierEntry, recipe: Recipe, modifiers: Mapping[str, AnyModifier[Any]]) -> None:
    """Raise PlanError where another kind of modifier stands before a rearranger in its stage."""
    for other in recipe.modifiers:
        if other.key == entry.key:
            return
        if other.stage == entry.stage and not isinstance(modifiers[other.key], Rearranger):
            raise PlanError(
                f"it reorders a layer before anything in it is observed or changed, but {other.name} ({other.where}) stands "
                f"before it in {entry.stage}; move it to the front of its stage"
            )


def _check_untouched(chains: Sequence[RearrangePlan], rows: Sequence[ModulePlan]) -> None:
    """Raise PlanError where an earlier stage changed a module to be reordered: its mask and factors have the old order."""
    changed = {module.name: module for module in rows}
    for name in (name for row in chains for name in row.chain.names if name in changed):
        by = changed[name]
        raise PlanError(
            f"{name} is changed by {_name(by.modifier)} in {by.stage}, before it is to be reordered; put the reordering first"
        )


def _plan_module(
    entry: ModifierEntry, modifier: Modifier[Any], model: nn.Module, layers: DecoderLayers, itemsize: int, name: str
) -> ModulePlan:
    layer = layers.layer_of(name)
    if layer is None:
        raise PlanError(
            f"{name} is not inside a decoder layer, where calibration inputs are taken; add {name!r} to `ignore`"
        )
    linear = model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    other = tied_to(model, name)
    if other is not None:
        raise PlanError(f"the weight of {name} is tied to {other}; add {name!r} to `ignore`")
    shape = ModuleShape(name, linear.out_features, linear.in_features, itemsize)
    cost = modifier.plan(shape)
    return _row(entry, shape, layer, cost)


def _check_factor_modifier(entry: ModifierEntry, recipe: Recipe, modifiers: Mapping[str, AnyModifier[Any]]) -> None:
    """Raise PlanError where factors are not stored, or where another modifier of the stage would train them only afterwards."""
    if recipe.output.format == "dense":
        raise PlanError(
            "output.format dense stores folded weights, in which factors leave nothing to change: set output.format: "
            "compressed-tensors, or leave it out"
        )
    before = recipe.modifiers[: [other.key for other in recipe.modifiers].index(entry.key)]
    for other in before:
        modifier = modifiers[other.key]
        if other.stage == entry.stage and isinstance(modifier, Refiner) and modifier.scope == "model":
            raise PlanError(
                f"{other.name} ({other.where}) before it trains the whole model at the end of {entry.stage}, after this one has "
                "changed every layer; put this one into a later stage"
            )


def _plan_change(
    entry: ModifierEntry, modifier: FactorModifier[Any], rows: Sequence[ModulePlan], name: str
) -> ModulePlan:
    """A row for a module whose factors, made by the modifiers before, are changed."""
    made = {module.name: module for module in rows}.get(name)
    if made is None or made.stored_as != "packed" or made.block_size is None:
        by = "" if made is None else f" ({_name(made.modifier)} stores it dense)"
        raise PlanError(
            f"no modifier before it makes 2:4 factors for {name}{by}; put it after an ARMORModifier that takes the module, or add "
            f"{name!r} to `ignore`"
        )
    itemsize = made.bytes_before // (made.d_out * made.d_in)
    shape = ModuleShape(name, made.d_out, made.d_in, itemsize)
    return _row(entry, shape, made.layer, modifier.plan(shape, made.block_size))


def _row(entry: ModifierEntry, shape: ModuleShape, layer: int, cost: Estimate) -> ModulePlan:
    block = cost.block_size
    return ModulePlan(
        name=shape.name,
        modifier=entry.key,
        stage=entry.stage,
        layer=layer,
        d_out=shape.d_out,
        d_in=shape.d_in,
        block_size=block,
        blocks=None if block is None else (shape.d_out // block[0], shape.d_in // block[1]),
        bytes_before=shape.dense_bytes,
        bytes_after=cost.stored_bytes,
        factor_bytes=cost.factor_bytes,
        flops=cost.flops,
        peak_bytes=cost.peak_bytes,
        stored_as=cost.stored_as,
        core=cost.core,
    )


def _plan_refiner(
    entry: ModifierEntry,
    refiner: Refiner[Any],
    model: nn.Module,
    layers: DecoderLayers,
    rows: list[ModulePlan],
    targets: Sequence[str],
) -> list[RefinePlan]:
    """One unit a layer, or one for the model, of the targeted modules that this stage factorised before."""
    wanted = set(targets)
    fixed = next((m for m in rows if m.name in wanted and m.core != "float"), None)
    if fixed is not None:
        raise PlanError(
            f"{_name(fixed.modifier)} makes the core of {fixed.name} {fixed.core} before it, and a refiner trains and stores float "
            "cores; put it before that"
        )
    taken = [m for m in rows if m.stage == entry.stage and m.name in wanted and m.stored_as == "packed"]
    if targets and not taken:
        raise PlanError(
            f"no modifier before it in {entry.stage} makes 2:4 factors for a module of its targets; put it after an "
            "ARMORModifier of the same stage"
        )
    by_layer: dict[int | None, list[ModulePlan]] = {}
    for module in taken:
        by_layer.setdefault(module.layer if refiner.scope == "layer" else None, []).append(module)
    units = sorted(by_layer.items(), key=lambda item: item[0] or 0)
    return [_plan_unit(entry, refiner, model, layers, index, found) for index, found in units]


def _plan_unit(
    entry: ModifierEntry,
    refiner: Refiner[Any],
    model: nn.Module,
    layers: DecoderLayers,
    index: int | None,
    found: list[ModulePlan],
) -> RefinePlan:
    spec = entry.config.calibration
    assert spec is not None
    part = model if index is None else layers.modules[index]
    itemsize = found[0].bytes_before // (found[0].d_out * found[0].d_in)
    unit = RefineUnit(
        modules=tuple(ModuleShape(m.name, m.d_out, m.d_in, itemsize) for m in found),
        factor_values=sum(m.factor_bytes // itemsize + m.d_out * m.d_in // 2 for m in found),
        parameters=sum(p.numel() for p in part.parameters()),
        tokens=calibration_tokens(spec),
        batch_tokens=spec.batch_size * spec.sequence_length,
    )
    cost = refiner.plan(unit)
    return RefinePlan(
        modifier=entry.key,
        stage=entry.stage,
        unit="model" if index is None else layers.names[index],
        layer=index,
        modules=tuple(m.name for m in found),
        tokens=unit.tokens,
        flops=cost.flops,
        peak_bytes=cost.peak_bytes,
    )


def _once(text: str, names: list[str]) -> str:
    """One message for modules that are refused for the same reason: it names the first and counts the others."""
    others = f" (and {len(names) - 1} more like it: {', '.join(names[1:4])}{', …' if len(names) > 4 else ''})"
    return text.replace("{}", names[0]) + (others if len(names) > 1 else "")


def _conflicts(recipe: Recipe, rows: list[ModulePlan], modifiers: Mapping[str, AnyModifier[Any]]) -> list[str]:
    """Two modifiers of one category on a module, or one that cannot follow another, as messages."""
    where = {entry.key: entry.where for entry in recipe.modifiers}
    seen: dict[str, list[str]] = {}
    problems = []
    for row in rows:
        for earlier in seen.setdefault(row.name, []):
            category, previous = modifiers[row.modifier].category, modifiers[earlier].category
            if category == previous:
                problems.append(
                    f"{where[row.modifier]}: {_name(row.modifier)}: {row.name} is already taken by "
                    f"{_name(earlier)} ({where[earlier]}), and both {category}; narrow the targets of one of them"
                )
            elif previous in modifiers[row.modifier].cannot_follow:
                reason = modifiers[row.modifier].cannot_follow[previous]
                problems.append(
                    f"{where[row.modifier]}: {_name(row.modifier)}: cannot follow {_name(earlier)} on {row.name}: {reason}"
                )
        seen[row.name].append(row.modifier)
    return problems


def _unservable(recipe: Recipe, model: nn.Module, layers: DecoderLayers, rows: list[ModulePlan]) -> list[str]:
    """What keeps a server from splitting packed modules as `serve` asks, as messages, one for layers that are alike."""
    if recipe.serve is None or recipe.output.format == "dense":
        return []
    entries = {entry.key: entry for entry in recipe.modifiers}
    packed = {
        row.name: PackedModule(entries[row.modifier], (row.d_out, row.d_in), _spec(entries[row.modifier], row))
        for row in {row.name: row for row in rows}.values()
        if row.stored_as == "packed"
    }
    found: dict[tuple[str, str], list[str]] = {}
    for entry, name, problem in serve_problems(model, packed, recipe.serve.tensor_parallel):
        layer = layers.names[layers.layer_of(name) or 0]
        found.setdefault((f"{entry.where}: {entry.name}", problem.replace(layer, "{}")), []).append(layer)
    return [f"{place}: {_once(text, names)}" for (place, text), names in found.items()]


def _spec(entry: ModifierEntry, row: ModulePlan) -> LayerSpec:
    """How the checkpoint will describe a packed module."""
    assert row.block_size is not None
    group = None if row.core == "float" else getattr(entry.config, "group_size", None)
    return LayerSpec(row.block_size, row.core, None, None if group == row.d_in // 2 else group)


def _name(key: str) -> str:
    return key.split(".", 2)[-1]


def _late_dense(recipe: Recipe, modifiers: Mapping[str, AnyModifier[Any]]) -> list[str]:
    """What needs the dense model after a stage that changed weights: it is gone by then."""
    first = recipe.stages[0]
    return [
        f"{entry.where}: {entry.name}: {wants} needs the original model, but stage {entry.stage} comes after {first}, which "
        f"has changed it; put the modifier into {first}"
        for entry in recipe.modifiers
        if (wants := _wants_dense(entry, modifiers[entry.key])) and entry.stage != first
    ]


def _wants_dense(entry: ModifierEntry, modifier: AnyModifier[Any]) -> str:
    propagate = getattr(entry.config, "propagate", "")
    if isinstance(modifier, Refiner):
        return "it"
    return f"propagate: {propagate}" if propagate in ("dense", "matched") else ""


def _totals(
    recipe: Recipe,
    rows: list[ModulePlan],
    others: Sequence[RefinePlan | RearrangePlan],
    model: nn.Module,
    modifiers: Mapping[str, AnyModifier[Any]],
    itemsize: int,
) -> Totals:
    touched = {m.name for m in rows}
    before = sum({m.name: m.bytes_before for m in rows}.values())
    parameters = sum(p.numel() for p in model.parameters())
    held = {(e.config.calibration, kind) for e in recipe.modifiers for kind in _activations_of(e, modifiers[e.key])}
    tokens = sum(calibration_tokens(spec) for spec, _ in held if spec is not None)
    forth_and_back = {e.config.calibration for e in recipe.modifiers if _needs_gradients(modifiers[e.key])}
    passed = tokens + sum(calibration_tokens(spec) for spec in forth_and_back if spec is not None)
    places = {(m.stage, m.layer, m.modifier) for m in rows}
    together = [[m.peak_bytes for m in rows if (m.stage, m.layer, m.modifier) == place] for place in places]
    return Totals(
        modules=len(touched),
        bytes_before=before,
        bytes_after=sum({m.name: m.bytes_after for m in rows}.values()),
        factor_bytes=sum({m.name: m.factor_bytes for m in rows}.values()),
        untouched_bytes=parameters * itemsize - before,
        peak_bytes=estimate_peak_bytes(
            model, tokens, solve_bytes=max([0, *map(bytes_at_once, together), *(r.peak_bytes for r in others)])
        ),
        seconds=estimate_seconds(sum(m.flops for m in (*rows, *others)), parameters, passed),
    )


def streams_of(entry: ModifierEntry, modifier: AnyModifier[Any]) -> tuple[str, ...]:
    """Of which models an entry reads activations: of the one as `compressed` so far, of the `dense` one, or of both."""
    if entry.config.calibration is None:
        return ()
    if scope_of(modifier) == "layer" or is_matched(entry):
        return "compressed", "dense"
    return () if scope_of(modifier) == "model" else (getattr(entry.config, "propagate", "compressed"),)


def scope_of(modifier: AnyModifier[Any]) -> str:
    """What a modifier changes at once: a `module`, a `layer` or the `model`."""
    return modifier.scope if isinstance(modifier, Refiner) else "module"


def is_matched(entry: ModifierEntry) -> bool:
    """Whether an entry's modules aim at what the dense model's give on the same tokens."""
    return getattr(entry.config, "propagate", "") == "matched"


def _activations_of(entry: ModifierEntry, modifier: AnyModifier[Any]) -> tuple[str, ...]:
    """Sets of activations that are held for an entry: its streams, and where it is matched the dense layer's inputs as well."""
    streams = streams_of(entry, modifier)
    return (*streams, "dense inputs") if is_matched(entry) else streams


def _needs_gradients(modifier: AnyModifier[Any]) -> bool:
    return isinstance(modifier, Modifier) and modifier.needs_gradients
