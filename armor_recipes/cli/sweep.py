"""`armor sweep SWEEP`: one recipe at many points, each run once, in one table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from armor_recipes.cli.loading import loading

if TYPE_CHECKING:  # importing it takes torch's seconds, which `armor --help` need not pay
    from armor_recipes.recipe import Recipe


def sweep_command(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP", help="Sweep file: a recipe, and what is varied of it.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B.C=VALUE", help="Set one key in all points; repeatable.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Folder for runs and results; replaces the sweep's output.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="List the points with what each would take, and stop.")] = False,
    keep_models: Annotated[
        bool,
        typer.Option("--keep-models", help="Keep each point's checkpoint in OUTPUT/models, not its reports alone."),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan or the result as JSON.")] = False,
    device: Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:N.")] = "cpu",
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Start points over that were cut short, in the place of going on from their journals."
        ),
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no table; errors only.")] = False,
) -> None:
    """Run a recipe at many points, each once, and compare them (armor sweep sweep.yaml --plan)."""
    with loading():
        from armor_recipes.cli.apart import run_apart
        from armor_recipes.cli.quiet import quiet_libraries
        from armor_recipes.cli.sweep_tables import plan_json, plan_table, result_lines, result_table
        from armor_recipes.cli.view import progress_view
        from armor_recipes.run.sweep import plan_sweep, read_sweep, run_sweep

    quiet_libraries()
    out, err = Console(), Console(stderr=True)
    read = read_sweep(sweep, overrides=overrides or (), output=output)
    if plan:
        planned = plan_sweep(read, device=device, keep_models=keep_models)
        if as_json:
            print(json.dumps(plan_json(planned), indent=2))
        else:
            out.print(plan_table(planned))
        return

    def work(recipe: Recipe, device: str, overwrite: bool) -> None:
        with progress_view(err, quiet=quiet) as view:
            run_apart(recipe, device, overwrite, fresh, view)

    def tell(text: str) -> None:
        if not quiet:
            err.print(text, markup=False, highlight=False, soft_wrap=True)

    result = run_sweep(read, device=device, keep_models=keep_models, work=work, tell=tell)
    rows = result.found["points"]
    if as_json:
        print(json.dumps(result.found, indent=2))
    elif not quiet:
        out.print(result_table(rows))
        out.print(*result_lines(rows, read.output), sep="\n", markup=False, highlight=False, soft_wrap=True)
    if result.failed:
        name, error = next(iter(result.failed.items()))
        raise type(error)(f"{len(result.failed)} of {len(rows)} points failed, first {name}: {error}")
