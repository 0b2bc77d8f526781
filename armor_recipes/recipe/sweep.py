"""A sweep file: one recipe at many points, each with other values of some of its fields."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, JsonValue

from armor_recipes.errors import RecipeError
from armor_recipes.recipe import yaml_source
from armor_recipes.recipe.composition import (
    EXTENDS,
    MAX_SET_KEYS,
    REMOVE,
    Files,
    passable,
    remove,
    set_value,
)
from armor_recipes.recipe.loading import Registry, finish
from armor_recipes.recipe.problems import Mark, Problems, printable
from armor_recipes.recipe.recipe import Recipe
from armor_recipes.recipe.schema import Name, Strict
from armor_recipes.recipe.tree import Entry, Items, Node, Scalar, Table, is_null, merge, plain
from armor_recipes.recipe.validation import validate

MAX_POINTS = 1000
Keys = tuple[str, ...]
_MISSING: dict[Keys, str] = {
    ("recipe",): "name a recipe file or a built-in recipe",
    ("output",): "add `output: FOLDER` or give --output FOLDER",
}
Values = dict[Name, JsonValue]
Layer = Mapping[str, Entry]


class SweepSpec(Strict):
    """What a sweep file holds."""

    recipe: Name | Annotated[tuple[Name, ...], Field(min_length=1)] = Field(
        title="Recipe",
        description="Recipe file, relative to this file, or name of a built-in recipe; several are laid over each other in order.",
    )
    set: Values = Field(
        default={},
        title="Set",
        description="Values that all points have, by keys of the recipe with dots between, as `--set` takes them. "
        "`remove` takes keys out.",
    )
    points: Annotated[dict[Name, Values], Field(min_length=1)] | None = Field(
        default=None,
        title="Points",
        description="Points by name, each with values by keys of the recipe; `{}` is the recipe as it is.",
    )
    grid: Annotated[dict[Name, Annotated[tuple[JsonValue, ...], Field(min_length=1)]], Field(min_length=1)] | None = (
        Field(
            default=None,
            title="Grid",
            description="Lists of values by keys of the recipe: all combinations are run, and with `points` each of those at each.",
        )
    )
    output: Name = Field(title="Output", description="Folder for runs and results, relative to the working directory.")


@dataclass(frozen=True, slots=True)
class Point:
    """One recipe of a sweep; `values` are those that make it this one, by keys with dots between.

    Its output lies in the sweep's, in a folder of its own.
    """

    name: str
    values: Mapping[str, Any]
    recipe: Recipe


@dataclass(frozen=True, slots=True)
class Sweep:
    """A checked sweep; its points in the order in which they run, each with a name of its own."""

    name: str
    output: str
    points: tuple[Point, ...]


def is_sweep(file: Path) -> bool:
    """Whether a file can be read and has a key that only sweeps have."""
    table = yaml_source.read_file(file, Problems())
    return table is not None and not {"points", "grid"}.isdisjoint(table.entries)


def load_sweep(
    file: Path,
    *,
    overrides: Sequence[str] = (),
    registry: Registry,
    builtin_dir: Path | None = None,
    output: str | None = None,
) -> Sweep:
    """Return the sweep in a file, each of its recipes checked. `overrides` (`a.b.c=value`) are set in all of them last.

    Raises RecipeError with the problems of all points, one a line: `file:line: path.to.key: what`.
    """
    problems = Problems()
    if output == "":
        raise RecipeError("--output must not be empty: name a folder, or leave it out")
    table = yaml_source.read_file(file, problems)
    problems.raise_if_any()
    assert table is not None, "without a table a problem was noted"
    data = {**_plain(table), **({} if output is None else {"output": output})}
    spec = validate(SweepSpec, table, data=data, path=(), problems=problems, mark=table.mark, missing=_MISSING)
    problems.raise_if_any()
    assert spec is not None, "without a spec a problem was noted"
    files = Files(builtin_dir, problems)
    base = files.extend(Table({"recipe": table.entries["recipe"]}, table.mark), key="recipe")
    if not {"points", "grid"}.isdisjoint(base.entries):
        problems.add(
            table.entries["recipe"].mark, ("recipe",), "is a sweep, and no recipe; name the recipe that it varies"
        )
        problems.raise_if_any()
    common = _layer(table, "set", problems)
    combined = _combined(table, problems)
    own = table.entries["output"] if output is None else Entry(_flag(output), Scalar(output, _flag(output)))
    for layers in combined.values():
        _check_apart([{"output.path": own}, common, *layers], overrides, problems)
    problems.raise_if_any()
    points, refused = [], dict[str, None]()
    for number, (name, layers) in enumerate(combined.items(), start=1):
        try:
            recipe = _recipe(base, [common, *layers], overrides, f"{spec.output}/models/{number}", registry)
        except RecipeError as error:
            refused.update(dict.fromkeys(str(error).split("\n")))
            continue
        values = {key: plain(entry.node) for layer in layers for key, entry in layer.items()}
        points.append(Point(name, values, replace(recipe, files=(*files.opened, file.resolve()))))
    if refused:
        raise RecipeError("\n".join(refused))
    return Sweep(file.name, spec.output, tuple(points))


def _combined(table: Table, problems: Problems) -> dict[str, list[Layer]]:
    """The points by name, each with the layers that make it; none after noting that there are none, too many, or two of a name."""
    axes = list(_axes(table, problems))
    count = math.prod(map(len, axes)) if axes else 0
    if not count:
        problems.add(table.mark, (), "no point; give `grid`, `points` or both")
    elif count > MAX_POINTS:
        problems.add(table.mark, (), f"{count:,} points; a sweep has at most {MAX_POINTS:,}")
    else:
        named = [
            (", ".join(label for label, _ in each), [layer for _, layer in each]) for each in itertools.product(*axes)
        ]
        combined = dict(named)
        if len(combined) == count:
            return combined
        if not problems.found:
            problems.add(table.mark, (), "two points have the same name; give `points` other ones")
    return {}


def _flag(output: str) -> Mark:
    return Mark(f"--output {output}", None, Path())


def _plain(table: Table) -> dict[str, object]:
    return {key: plain(entry.node) for key, entry in table.entries.items()}


def _layer(table: Table, key: str, problems: Problems) -> Layer:
    """What stands at a key: values by paths, which are checked."""
    node = table.entries[key].node if key in table.entries else None
    layer = node.entries if isinstance(node, Table) else {}
    for path, entry in layer.items():
        _check_path(path, entry.mark, problems)
    return layer


def _check_path(path: str, mark: Mark, problems: Problems) -> None:
    keys = path.split(".")
    if not all(keys) or len(keys) > MAX_SET_KEYS or keys[0] == EXTENDS:
        problems.add(mark, (path,), "is no key of a recipe that can be set: write its keys with dots between, `a.b.c`")


def _axes(table: Table, problems: Problems) -> Iterator[list[tuple[str, Layer]]]:
    """What is combined: the named points, and the values of each key of the grid. A label and a layer each."""
    named = table.entries["points"].node if "points" in table.entries else None
    if isinstance(named, Table):
        yield [(printable(name), _layer(named, name, problems)) for name in named.entries]
    grid = _layer(table, "grid", problems)
    for path, (mark, node) in grid.items():
        values = node.nodes if isinstance(node, Items) else ()
        labels = [f"{short_key(path, grid)}={_label(value)}" for value in values]
        same = [_same_value(plain(value)) for value in values]
        for label in dict.fromkeys(label for label, one in zip(labels, same, strict=True) if same.count(one) > 1):
            problems.add(mark, ("grid", path), f"{label} is there twice; remove one")
        yield [(label, {path: Entry(value.mark, value)}) for label, value in zip(labels, values, strict=True)]


def _same_value(value: object) -> str:
    """A text that equal values have in common: 2 and 2.0 have, 1 and true have not."""
    whole = int(value) if isinstance(value, float) and value.is_integer() else value
    return json.dumps(whole, ensure_ascii=False, sort_keys=True)


def short_key(path: str, paths: Iterable[str]) -> str:
    """As many last keys of a path as no other of `paths` ends with."""
    keys = path.split(".")
    ends = (".".join(keys[-count:]) for count in range(1, len(keys)))
    return next((end for end in ends if sum(f".{other}".endswith(f".{end}") for other in paths) == 1), path)


def _label(node: Node) -> str:
    value = plain(node)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _check_apart(layers: Sequence[Layer], overrides: Sequence[str], problems: Problems) -> None:
    """Note where two layers of one point, or one and an override, give the same value: one would silently lose."""
    given: list[tuple[Keys, Mark, bool]] = []
    for layer in layers:
        leaves = [
            leaf for path, entry in layer.items() if path != REMOVE for leaf in _leaves(tuple(path.split(".")), entry)
        ]
        for keys, mark, null in leaves:
            other = next((at for before, at, null_ in given if _same(keys, before, either_null=null or null_)), None)
            if other is not None:
                problems.add(mark, keys, f"is given at {other}, too; keep one of the two")
        given += leaves
    for override in overrides:
        keys = tuple(key.strip() for key in override.partition("=")[0].split("."))
        other = next((at for before, at, null in given if _same(keys, before, either_null=null)), None)
        if other is not None:
            problems.add(Mark(f"--set {override}", None, Path()), keys, f"is given at {other}; leave --set out")


def _leaves(keys: Keys, entry: Entry) -> Iterator[tuple[Keys, Mark, bool]]:
    """What a value sets: its keys, their place, and whether it is null."""
    mark, node = entry
    if isinstance(node, Table) and node.entries:
        for key, child in node.entries.items():
            yield from _leaves((*keys, key), child)
    else:
        yield keys, mark, is_null(node)


def _same(one: Keys, other: Keys, *, either_null: bool) -> bool:
    """Whether two values are one, or one lies in the other; null holds nothing."""
    length = min(len(one), len(other))
    return one == other or (one[:length] == other[:length] and not either_null)


def _recipe(base: Table, layers: Sequence[Layer], overrides: Sequence[str], output: str, registry: Registry) -> Recipe:
    """The base with layers laid over it in order."""
    problems = Problems()
    for layer in layers:
        table = Table({}, base.mark)
        for path, (mark, node) in layer.items():
            keys = tuple(path.split("."))
            if passable(table, keys, mark, problems):
                table = set_value(table, keys, node, mark)
        left, table = remove(base, table, problems)
        for path, (mark, _) in layer.items():
            if isinstance(left, Table):
                passable(left, tuple(path.split(".")), mark, problems)
        merged = merge(left, table)
        assert isinstance(merged, Table), "two mappings make one"
        base = merged
    problems.raise_if_any()
    return finish(base, overrides, {"model": None, "output": output}, registry, problems)
