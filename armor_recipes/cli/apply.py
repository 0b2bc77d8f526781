"""`armor-apply RECIPE…`: run a recipe and write its checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from rich.console import Console

from armor_recipes.cli.guard import run_command

app = typer.Typer(
    add_completion=False, pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]}
)

_EPILOG = """
Examples:  armor-apply quickstart  |  armor-apply my.yaml --plan  |  armor-apply base.yaml mine.yaml --output out/mine --overwrite
|  armor-apply my.yaml --set prune_stage.armor_modifiers.ARMORModifier.block_size=32

Exit codes: 0 done, 1 a bug here, 2 recipe or usage, 3 plan refused, 4 numerical failure, 5 input or checkpoint unreadable,
6 verification mismatch or another run on the output, 7 disk or memory, 8 quality gate, 129 terminal closed, 130 interrupted,
143 terminated.
"""


@app.command(epilog=_EPILOG)
def apply_command(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE...", help="Recipe files or built-in names, laid over each other in order."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B.C=VALUE", help="Set one key of the recipe; repeatable.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Folder to write; replaces the recipe's output.path.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing checkpoint at the output path.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be done, and its cost, and stop.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan or the result as JSON on standard output.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", dir_okay=False, help="Also write report.json to this file."),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:N.")] = "cpu",
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no summary; errors only.")] = False,
) -> None:
    """Prune a language model as RECIPE says, and write a checkpoint that loads in transformers."""
    from armor_recipes.cli.quiet import quiet_libraries
    from armor_recipes.cli.tables import plan_table, resolved_recipe, result_json, summary, warning_lines
    from armor_recipes.cli.view import progress_view
    from armor_recipes.run import execute, prepare
    from armor_recipes.run.checks import check_places
    from armor_recipes.run.job import read_recipe
    from armor_recipes.run.report_file import check_report_file, write_report
    from armor_recipes.run.settling import is_settled, settled_before

    quiet_libraries()
    out, err = Console(), Console(stderr=True)
    job = prepare(read_recipe(recipes, overrides=overrides or (), output=output), device=device)
    if plan:
        check_places(job.source, job.recipe)
        if not is_settled(job):
            with progress_view(err, quiet=quiet) as view:
                job = settled_before(job, view)
        if as_json:
            found = {"plan": job.plan.to_dict(), "estimate": asdict(job.estimate), "recipe": job.recipe.resolved}
            print(json.dumps(found, indent=2))
        else:
            out.print(plan_table(job.plan, job.estimate), *resolved_recipe(job.recipe))
        return
    if report is not None:
        check_report_file(report)
    for note in (*job.plan.notes, *warning_lines(job.plan)) if not quiet else ():
        err.print(note, markup=False)
    with progress_view(err, quiet=quiet) as view:
        result = execute(job, overwrite=overwrite, observer=view)
    if report is not None:
        write_report(report, result.report, output=result.output)
    if as_json:
        print(json.dumps(result_json(result), indent=2))
    elif not quiet:
        out.print(summary(result))


def main() -> NoReturn:
    """Entry point of `armor-apply`."""
    run_command(app, name="armor-apply")
