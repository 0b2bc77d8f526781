"""`armor inspect FOLDER`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armor_recipes.errors import RecipeError

if TYPE_CHECKING:  # importing it takes torch's seconds, which `armor --help` need not pay
    from rich.console import Group

    from armor_recipes.checkpoint.reader import CheckpointSize, LayerSize

_KINDS = {
    "armor": "ARMOR layers",
    "sparse-24-bitmask": "plain 2:4 layers (legacy format)",
    "marlin-24": "quantised 2:4 layers (legacy format)",
}


def inspect_command(
    folder: Annotated[Path | None, typer.Argument(help="A checkpoint folder; left out with --runtime.")] = None,
    runtime: Annotated[
        bool, typer.Option("--runtime", help="Show what this machine can compute with instead.")
    ] = False,
    every: Annotated[bool, typer.Option("--all", help="A line for each layer, not for each kind and shape.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show ARMOR layers' shapes, blocks, core types and bytes, and totals (armor inspect out/quickstart)."""
    if runtime == (folder is not None):
        raise RecipeError("armor inspect takes a checkpoint folder or --runtime, one of the two")
    if folder is None:
        _print_runtime(as_json=as_json)
    else:
        _print_folder(folder, as_json=as_json, every=every)


def _print_runtime(*, as_json: bool) -> None:
    from armor_recipes.runtime import capabilities

    found = asdict(capabilities())
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for name, value in found.items():
        print(f"{name.replace('_', ' '):<24} {_words(value)}")


def _words(value: object) -> str:
    match value:
        case None:
            return "-"
        case bool():
            return "yes" if value else "no"
        case dict():
            return ", ".join(f"{key}: {_words(item)}" for key, item in value.items()) or "none"
        case list() | tuple():
            return ", ".join(map(_words, value)) or "none"
        case _:
            return str(value)


def _print_folder(folder: Path, *, as_json: bool, every: bool) -> None:
    from armor_recipes.checkpoint.reader import inspect

    found = inspect(folder)
    if as_json:
        print(json.dumps(_data(found), indent=2))
        return
    from rich.console import Console

    Console().print(_table(str(folder), found, every=every))
    beside = f", {len(found.plain)} plain quantised layers" if found.plain else ""
    print(
        f"{len(found.layers)} {_KINDS[found.format]}{beside}\n"
        f"{found.nbytes} bytes with all other tensors, dense {found.dense_nbytes}, ratio {found.ratio:.3f}"
    )


def _table(title: str, found: CheckpointSize, *, every: bool) -> Group:
    """A line for what is stored in one way, and below it one for each kind and shape of layer, or for `every` layer."""
    from armor_recipes.cli.names import grouped
    from armor_recipes.cli.tables import modules_table

    shown = _lines(found)
    lines = [(one.name, [one]) for one in shown] if every else grouped(shown, lambda one: one.name, _kind)
    cells = [(rows[0].stored_as, name, *_cells(rows, exact=every)) for name, rows in lines]
    return modules_table(title, ("shape", "block", "B of", "bytes", "dense", "ratio"), cells)


@dataclass(frozen=True, slots=True)
class _Line:
    """A layer of the table."""

    name: str
    shape: str
    block: str
    stored_as: str
    factor: str
    nbytes: int
    dense: int


def _lines(found: CheckpointSize) -> list[_Line]:
    armor = [
        _Line(x.name, _by(x.shape), _by(x.block_size), _core(x), _factor(x), x.nbytes, x.dense_nbytes)
        for x in found.layers
    ]
    return armor + [_Line(x.name, _by(x.shape), "-", x.scheme, "", x.nbytes, x.dense_nbytes) for x in found.plain]


def _kind(line: _Line) -> tuple[str, ...]:
    return line.shape, line.stored_as, line.factor


def _by(shape: tuple[int, int]) -> str:
    return "x".join(map(str, shape))


def _factor(layer: LayerSize) -> str:
    """The module whose B a layer uses; one that lies beside the layer by its last name."""
    parent, _, last = (layer.input_factor or "").rpartition(".")
    return last if parent == layer.name.rpartition(".")[0] else layer.input_factor or ""


def _cells(rows: Sequence[_Line], *, exact: bool) -> tuple[str, ...]:
    from armor_recipes.cli.tables import one_of, size

    first, nbytes, dense = rows[0], sum(row.nbytes for row in rows), sum(row.dense for row in rows)
    shown = (str(nbytes), str(dense)) if exact else (size(nbytes), size(dense))
    return first.shape, one_of([row.block for row in rows], "sizes"), first.factor, *shown, f"{nbytes / dense:.3f}"


def _core(layer: LayerSize) -> str:
    return layer.core if layer.group_size is None else f"{layer.core}, groups of {layer.group_size}"


def _data(found: CheckpointSize) -> dict[str, Any]:
    layers = [
        {
            "name": x.name,
            "shape": list(x.shape),
            "block_size": list(x.block_size),
            "core": x.core,
            "input_factor": x.input_factor,
            "bytes": x.nbytes,
            "dense_bytes": x.dense_nbytes,
            "ratio": x.ratio,
            "group_size": x.group_size,
        }
        for x in found.layers
    ]
    return {
        "format": found.format,
        "layers": layers,
        "plain": [{**asdict(x), "shape": list(x.shape), "ratio": x.ratio} for x in found.plain],
        "bytes": found.nbytes,
        "dense_bytes": found.dense_nbytes,
        "other_bytes": found.other_nbytes,
        "ratio": found.ratio,
    }
