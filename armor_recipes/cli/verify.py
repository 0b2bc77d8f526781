"""`armor verify FOLDER`: the tensors and files of a checkpoint against the hashes of its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def verify_command(
    folder: Annotated[Path, typer.Argument(help="A checkpoint folder with an armor_manifest.json.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Compare every tensor and file with the SHA-256 in armor_manifest.json (armor verify out/quickstart)."""
    from dataclasses import asdict

    from armor_recipes.checkpoint.verify import verify

    found = verify(folder)
    if as_json:
        print(json.dumps(asdict(found), indent=2))
        return
    print(
        f"{found.tensors} tensors, {found.nbytes} bytes: as in armor_manifest.json (format version {found.format_version}); "
        f"{found.layers} packed layers are well formed, no number is NaN; {found.files} other files as they were"
    )
    for name, count in found.infinite.items():
        print(f"{name}: {count} numbers are infinite, as they were when it was written")
    if found.missing:
        print(f"in armor_manifest.json, and not there: {', '.join(found.missing)}")
