"""What comes packed or quantised with the model: rows that no entry made, and what entries may not do to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from armor_recipes.checkpoint.compressed import CompressedModel
from armor_recipes.checkpoint.config import LayerSpec, PackedShapes
from armor_recipes.checkpoint.quantized import Scheme
from armor_recipes.errors import CheckpointError
from armor_recipes.model.blocks import Stacks
from armor_recipes.model.linears import Linears
from armor_recipes.modifiers import AnyModifier
from armor_recipes.modifiers.kinds.contract import Row, once
from armor_recipes.modifiers.kinds.module import GIVEN, ModulePlan
from armor_recipes.modifiers.kinds.quantizer import QuantizedPlan
from armor_recipes.recipe import ModifierEntry, Recipe

Modifiers = Mapping[str, AnyModifier[Any]]
_DONE = {"prune": "pruned", "quantize": "quantised"}
_STORED = {"int8": 1, "int4": 4, "fp8": 1}


@dataclass(frozen=True, slots=True)
class Given:
    """Rows of what stays as it is stored unless an entry changes it, and the schemes of plain layers that are decompressed."""

    rows: tuple[ModulePlan, ...] = ()
    decompressed: Mapping[str, Scheme] | None = None

    @property
    def by_name(self) -> dict[str, ModulePlan]:
        """The rows by module."""
        return {row.name: row for row in self.rows}


def given_rows(
    source: CompressedModel | None, linears: Linears, stacks: Stacks, *, itemsize: int, packed: bool
) -> Given:
    """The rows of a compressed model, on shapes alone; where the output is not `packed` plain layers become dense.

    Raises CheckpointError where a layer is no linear layer of the model, or does not fit its shape.
    """
    if source is None:
        return Given()
    for name in (*source.layers, *source.plain):
        if name not in linears.modules:
            raise CheckpointError(f"{source.folder}: {name} is packed or quantised, and no linear layer of the model")
    inside = [name for name in linears.modules if name in source.layers]  # in the model's order
    rows = [_packed_row(name, source.layers[name], linears, stacks, itemsize) for name in inside]
    if not packed:
        return Given(tuple(rows), source.plain)
    for name in (name for name in linears.modules if name in source.kept):
        own = _row(name, linears, stacks, itemsize)
        rows.append(_plain_row(own, source.kept[name], source.nbytes[name]))
    return Given(tuple(rows), source.decompressed)


def _row(name: str, linears: Linears, stacks: Stacks, itemsize: int) -> dict[str, Any]:
    linear, layer = linears.modules[name], stacks.block_of(name)
    rows, columns = linear.out_features, linear.in_features
    return {
        "name": name,
        "modifier": GIVEN,
        "stage": "",
        "layer": -1 if layer is None else layer,
        "d_out": rows,
        "d_in": columns,
        "bytes_before": rows * columns * itemsize,
        "flops": 0.0,
        "peak_bytes": 0,
    }


def _packed_row(name: str, spec: LayerSpec, linears: Linears, stacks: Stacks, itemsize: int) -> ModulePlan:
    own = _row(name, linears, stacks, itemsize)
    shape: tuple[int, int] = own["d_out"], own["d_in"]
    shapes = PackedShapes.of(shape, spec, name=name)
    factors = itemsize * (prod(shapes.a) + (0 if spec.input_factor else prod(shapes.b)))
    core = prod(shapes.values) * _STORED.get(spec.core, itemsize) + prod(shapes.bitmask)
    scales = 0 if shapes.scale is None else itemsize * prod(shapes.scale)
    (b_o, b_i) = spec.block_size
    return ModulePlan(
        **own,
        block_size=spec.block_size,
        blocks=(shape[0] // b_o, shape[1] // b_i),
        bytes_after=core + scales + factors,
        factor_bytes=factors,
        stored_as="packed",
        core=spec.core,  # type: ignore[arg-type]  # one of CORE_TYPES, as it was read
        group_size=spec.group_size,
        activations=spec.activations,
        pattern="2:4",
    )


def _plain_row(own: Mapping[str, Any], scheme: Scheme, nbytes: int) -> QuantizedPlan:
    return QuantizedPlan(
        **own,
        block_size=None,
        blocks=None,
        bytes_after=nbytes,
        factor_bytes=0,
        stored_as="quantized",
        scheme=scheme.text,
    )


def given_problems(recipe: Recipe, rows: Sequence[Row], modifiers: Modifiers, given: Given) -> Iterator[str]:
    """What entries would do once more, or to weights that are factors or integers."""
    made, decompressed = given.by_name, given.decompressed or {}
    changed: set[str] = set()
    for entry in recipe.modifiers:
        touched = list(dict.fromkeys(name for row in rows if row.modifier == entry.key for name in row.touches))
        modifier, found = modifiers[entry.key], dict[str, list[str]]()
        for name in touched:
            if name in made:
                problem = _refused(modifier, made[name])
            elif name in decompressed and name not in changed:
                problem = _again(modifier, decompressed[name])
            else:
                problem = ""
            found.setdefault(problem, []).append(name)
        changed.update(touched)
        yield from (f"{entry.where}: {entry.name}: {once(text, names)}" for text, names in found.items() if text)
        yield from _without_dense(recipe, entry, modifier, given)


def _refused(modifier: AnyModifier[Any], row: ModulePlan) -> str:
    """Why a modifier cannot take what the model brings, with `{}` for its name; empty where it can."""
    what, words = _described(row), _words(row)
    if modifier.category in words and modifier.category in _DONE:
        return (
            f"{{}} is already {_DONE[modifier.category]} in the model ({what}); narrow the targets, or give the dense model that "
            "it was made from"
        )
    reason = next((modifier.cannot_follow[word] for word in words if word in modifier.cannot_follow), "")
    if not reason and not modifier.needs.factors:
        reason = "it changes plain weights, and would leave the packed ones as they were"
    return f"{{}} comes with the model as {what}: {reason}; narrow the targets" if reason else ""


def _again(modifier: AnyModifier[Any], scheme: Scheme) -> str:
    if modifier.category != "quantize":
        return ""
    return (
        f"{{}} is already quantised in the model ({scheme.described}); give the dense model that it was made from, or, to round "
        "twice, what `armor export FOLDER OUT --to dense` makes of it"
    )


def _without_dense(recipe: Recipe, entry: ModifierEntry, modifier: AnyModifier[Any], given: Given) -> Iterator[str]:
    needs = modifier.needs
    if not given.rows or not (needs.dense or "dense" in needs.streams):
        return
    if needs.dense == "block":
        yield (
            f"{entry.where}: {entry.name}: {needs.because} needs each layer as it was before, and {recipe.model.id} is compressed: "
            "take `propagate: compressed`"
        )
    elif recipe.model.teacher is None:
        yield (
            f"{entry.where}: {entry.name}: {needs.because} needs the dense model, and {recipe.model.id} is compressed: name the "
            "one that it was made from as model.teacher"
        )


def _words(row: ModulePlan) -> tuple[str, ...]:
    """What rules about order call it, as if a modifier of that category and those traits stood before the recipe."""
    packed = ("prune", "factors") if row.stored_as == "packed" else ()
    return (*packed, "quantize") if row.core != "float" or row.quantized is not None else packed


def _described(row: ModulePlan) -> str:
    if row.quantized is not None:
        return row.quantized.described
    core = "" if row.core == "float" else f"of {row.core} "
    size = row.block_size or (1, 1)
    return f"a 2:4 core {core}" + ("without factors" if size == (1, 1) else f"with factors of {size[0]}x{size[1]}")


def given_notes(rows: Sequence[Row], given: Given) -> tuple[str, ...]:
    """What of the model stays as it is stored, and what is decompressed, counted."""
    touched = {name for row in rows for name in row.touches}
    left = Counter(_described(row) for row in given.rows if row.name not in touched)
    notes = [f"{count} layers of the model stay as they are stored: {what}" for what, count in left.items()]
    gone = Counter(scheme.described for scheme in (given.decompressed or {}).values())
    notes += [f"{count} layers of the model are decompressed: {what}{_lost(what)}" for what, count in gone.items()]
    return tuple(notes)


def _lost(described: str) -> str:
    return "; that activations were quantised is lost" if ";" in described else ""
