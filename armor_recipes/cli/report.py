"""`armor report FOLDER…`: the page of a run, or of several side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report_command(
    folders: Annotated[list[Path], typer.Argument(metavar="FOLDER...", help="Output folders of runs.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="FILE",
            help="The page to write; without it report.html and report.md of a single folder are written anew.",
        ),
    ] = None,
    evaluations: Annotated[
        list[Path] | None,
        typer.Option(
            "--eval",
            metavar="FILE",
            help="What `armor eval FOLDER --json` printed, to be shown from now on; repeatable.",
        ),
    ] = None,
) -> None:
    """Write the page of a run anew, or one of several runs side by side (armor report out/one out/two --output both.html)."""
    from armor_recipes.run.report_file import write_report_page

    print(f"wrote {write_report_page(folders, output, evaluations or ())}")
