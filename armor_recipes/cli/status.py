"""`armor status OUTPUT`: how far a run is, from another shell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:  # importing it takes torch's seconds, which `armor --help` need not pay
    from armor_recipes.run.status import Status


def status_command(
    output: Annotated[Path, typer.Argument(help="The output folder of a run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Show how far the run on an output is, or was when it was cut short (armor status out/quickstart)."""
    from dataclasses import asdict

    from armor_recipes.run.status import status

    found = status(output)
    print(json.dumps(asdict(found), indent=2) if as_json else "\n".join(_lines(found)))


def _lines(found: Status) -> list[str]:
    if found.state == "finished":
        return [f"finished: {found.output}"]
    who = f"process {found.process} on {found.host}, since {found.since}" if found.state == "running" else ""
    lines = [f"running: {who}" if who else "stopped: the same command goes on from there"]
    lines += [f"measured before: {', '.join(found.measured)}"] if found.measured else []
    lines.append(f"steps done: {found.steps}, {100 * found.share:.0f} % of the estimated work")
    lines += [f"last: {found.last} ({found.stage})"] if found.last else []
    if found.training is not None:
        lines.append(f"training: {found.training['step']}, {found.training['steps']} steps at its last snapshot")
    lines += [f"damaged lines of the journal: {found.damaged}"] if found.damaged else []
    lines += [f"last record: {found.updated}"] if found.updated else []
    return lines
