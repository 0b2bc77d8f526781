"""`armor inspect FOLDER`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armor_recipes.errors import RecipeError

if TYPE_CHECKING:  # importing it takes torch's seconds, which `armor --help` need not pay
    from rich.text import Text

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
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show each ARMOR layer's shape, blocks, core type and bytes, and totals (armor inspect out/quickstart)."""
    if runtime == (folder is not None):
        raise RecipeError("armor inspect takes a checkpoint folder or --runtime, one of the two")
    if folder is None:
        _print_runtime(as_json=as_json)
    else:
        _print_folder(folder, as_json=as_json)


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


def _print_folder(folder: Path, *, as_json: bool) -> None:
    from armor_recipes.checkpoint.reader import inspect

    found = inspect(folder)
    if as_json:
        print(json.dumps(_data(found), indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(folder)))
    for heading in ("layer", "shape", "block", "core", "B of"):
        table.add_column(heading, overflow="fold")
    for heading in ("bytes", "dense bytes", "ratio"):
        table.add_column(heading, justify="right")
    for layer in found.layers:
        row = _row(layer)
        table.add_row(*map(_cell, row.values()))
    for plain in found.plain:
        cells = (plain.name, "x".join(map(str, plain.shape)), None, plain.scheme, None)
        table.add_row(*map(_cell, (*cells, plain.nbytes, plain.dense_nbytes, plain.ratio)))
    Console().print(table)
    beside = f", {len(found.plain)} plain quantised layers" if found.plain else ""
    print(
        f"{len(found.layers)} {_KINDS[found.format]}{beside}; {found.nbytes} bytes with all other tensors, dense "
        f"{found.dense_nbytes}, ratio {found.ratio:.3f}"
    )


def _cell(value: Any) -> Text:
    from rich.text import Text

    return Text("" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value))


def _row(layer: LayerSize) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": f"{layer.shape[0]}x{layer.shape[1]}",
        "block_size": f"{layer.block_size[0]}x{layer.block_size[1]}",
        "core": layer.core if layer.group_size is None else f"{layer.core}, groups of {layer.group_size}",
        "input_factor": layer.input_factor,
        "bytes": layer.nbytes,
        "dense_bytes": layer.dense_nbytes,
        "ratio": layer.ratio,
    }


def _data(found: CheckpointSize) -> dict[str, Any]:
    layers = [
        {
            **_row(x),
            "shape": list(x.shape),
            "block_size": list(x.block_size),
            "core": x.core,
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
