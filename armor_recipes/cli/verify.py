"""`armor verify FOLDER`: the tensors of a checkpoint against the hashes of its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def verify_command(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder with an armor_manifest.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Compare every tensor with the SHA-256 in armor_manifest.json (armor verify out/quickstart)."""
    from dataclasses import asdict

    from armor_recipes.checkpoint.verify import verify

    found = verify(folder)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    print(
        f"{found.tensors} tensors, {found.nbytes} bytes: as in armor_manifest.json (format version {found.format_version}); "
        f"{found.layers} packed layers are well formed"
    )
