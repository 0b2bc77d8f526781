"""`armor inspect FOLDER`: what a checkpoint holds, from its headers alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:  # importing it takes torch's seconds, which `armor --help` need not pay
    from armor_recipes.checkpoint.reader import CheckpointSize, LayerSize


def inspect_command(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show each ARMOR layer's shape, blocks, core type and bytes, and totals (armor inspect out/quickstart)."""
    from armor_recipes.checkpoint.reader import inspect

    found = inspect(folder)
    if as_json:
        print(json.dumps(_data(found), indent=2))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(str(folder)))
    for heading in ("layer", "shape", "block", "core"):
        table.add_column(heading, overflow="fold")
    for heading in ("bytes", "dense bytes", "ratio"):
        table.add_column(heading, justify="right")
    for layer in found.layers:
        row = _row(layer)
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)
    print(
        f"{len(found.layers)} ARMOR layers; {found.nbytes} bytes with all other tensors, dense {found.dense_nbytes}, "
        f"ratio {found.ratio:.3f}"
    )


def _row(layer: LayerSize) -> dict[str, Any]:
    return {
        "name": layer.name,
        "shape": f"{layer.shape[0]}x{layer.shape[1]}",
        "block_size": f"{layer.block_size[0]}x{layer.block_size[1]}",
        "core": layer.core,
        "bytes": layer.nbytes,
        "dense_bytes": layer.dense_nbytes,
        "ratio": layer.ratio,
    }


def _data(found: CheckpointSize) -> dict[str, Any]:
    layers = [{**_row(x), "shape": list(x.shape), "block_size": list(x.block_size)} for x in found.layers]
    return {
        "layers": layers,
        "bytes": found.nbytes,
        "dense_bytes": found.dense_nbytes,
        "other_bytes": found.other_nbytes,
        "ratio": found.ratio,
    }
