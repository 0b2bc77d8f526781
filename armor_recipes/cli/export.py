"""`armor export FOLDER OUT --to FORMAT`: a checkpoint in another format."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from armor_recipes.cli.loading import loading


class ExportFormat(StrEnum):
    """What `--to` takes: `armor_recipes.checkpoint.export.Target`, spelled out since importing that takes torch's seconds."""

    ARMOR = "armor"
    DENSE = "dense"
    DENSE_2OF4 = "dense-2of4"
    SPARSE_24_BITMASK = "sparse-24-bitmask"


def export_command(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    output: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.")],
    to: Annotated[ExportFormat, typer.Option("--to", help="Format to write.")],
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing checkpoint at the output path.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Write a checkpoint in another format (armor export out/quickstart out/dense --to dense)."""
    from dataclasses import asdict

    with loading():
        from armor_recipes.cli.quiet import quiet_libraries
        from armor_recipes.integrations.exporting import export_folder

    quiet_libraries()
    done = export_folder(folder, output, to=to.value, overwrite=overwrite)
    if as_json:
        print(json.dumps(asdict(done), indent=2))
        return
    print(f"{done.layers} layers to {done.to}: {output}, {done.nbytes} bytes of tensors")
    for reason, names in done.stay.items():
        print(f"left as they are: {len(names)} linear layers ({names[0]}{', …' if len(names) > 1 else ''}): {reason}")
    if done.left_out:
        print(f"not copied: {', '.join(done.left_out)}")
    if to is ExportFormat.SPARSE_24_BITMASK:
        print(
            "load it with compressed-tensors <= 0.14.0.1 or armor_recipes.load; transformers 5 alone reads it wrongly"
        )
