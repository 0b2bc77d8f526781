"""`armor doctor`: what this machine can run, and why not more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def doctor_command(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Tell what this machine can run, and why not more; exit code 1 where something installed does not work (armor doctor)."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from armor_recipes.errors import ArmorError
    from armor_recipes.run.doctor import examine, to_dict

    found = examine(Path.cwd())
    if as_json:
        print(json.dumps(to_dict(found), indent=2))
    else:
        table = Table(box=None, show_header=False, padding=(0, 1, 0, 0), pad_edge=False)
        for row in found:
            told = Text(row.found)
            if row.advice:
                told.append(f"\n→ {row.advice}")
            table.add_row({"ok": "✓", "less": "-", "broken": "✗"}[row.state], row.subject, told)
        Console().print(table)
    broken = [row.subject for row in found if row.state == "broken"]
    if broken:
        raise ArmorError(f"does not work here: {', '.join(broken)}")
