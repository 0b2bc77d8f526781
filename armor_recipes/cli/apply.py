"""`armor-apply RECIPE…`: run a recipe and write its checkpoint."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from armor_recipes.cli.completion import complete_recipes
from armor_recipes.cli.flags import Version
from armor_recipes.cli.guard import run_command
from armor_recipes.cli.loading import loading
from armor_recipes.errors import RecipeError

if TYPE_CHECKING:
    from armor_recipes.run import Job, Result

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})

_EPILOG = """
Examples:  armor-apply quickstart  |  armor-apply my.yaml --plan  |  armor-apply base.yaml mine.yaml --output out/mine --overwrite
|  armor-apply my.yaml --set prune_stage.armor_modifiers.ARMORModifier.block_size=32

Exit codes: 0 done, 1 a bug here, 2 recipe or usage, 3 plan refused, 4 numerical failure, 5 input or checkpoint unreadable,
6 verification or lock mismatch, or another run on the output, 7 disk or memory, 8 quality gate, 129 terminal closed,
130 interrupted, 143 terminated.
"""


@app.command(epilog=_EPILOG)
def apply_command(
    recipes: Annotated[
        list[str],
        typer.Argument(
            metavar="RECIPE...",
            help="Recipe files or built-in names, laid over each other in order.",
            autocompletion=complete_recipes,
        ),
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
    every: Annotated[
        bool, typer.Option("--all", help="With --plan: a line for each module, not for each kind and shape.")
    ] = False,
    probe: Annotated[
        bool,
        typer.Option(
            "--probe", help="With --plan: measure the largest module of each kind once, and predict from that."
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan or the result as JSON on standard output.")
    ] = False,
    report: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE", dir_okay=False, help="Also write report.json to this file."),
    ] = None,
    metrics: Annotated[
        list[str] | None,
        typer.Option(
            "--metrics",
            metavar="SINK",
            help="Log losses, evaluation, time and memory: FILE.jsonl, tensorboard:FOLDER, trackio, wandb, mlflow; repeatable.",
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="Where to compute: cpu, cuda, cuda:N.")] = "cpu",
    locked: Annotated[
        bool,
        typer.Option("--locked", help="Refuse any difference from RECIPE.lock.yaml, also of a tensor that was made."),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over, where a run on this output was cut short and left a journal.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress and no summary; errors only.")] = False,
    version: Version = False,  # noqa: ARG001 - its callback ends the command
) -> None:
    """Prune a language model as RECIPE says, and write a checkpoint that loads in transformers."""
    with loading():
        from armor_recipes.cli.quiet import quiet_libraries
        from armor_recipes.cli.tables import warning_lines
        from armor_recipes.cli.view import progress_view
        from armor_recipes.compute.ranks import joined
        from armor_recipes.events import both
        from armor_recipes.report.metrics import check_files, metrics_to
        from armor_recipes.run import execute, follow, prepare
        from armor_recipes.run.job import read_recipe
        from armor_recipes.run.recipe_lock import lock_file, read_lock
        from armor_recipes.run.report_file import check_report_file, write_report

    quiet_libraries()
    _check_flags(plan=plan, probe=probe, every=every, locked=locked, metrics=metrics, report=report)
    out, err = Console(), Console(stderr=True)
    lock = read_lock(lock_file(recipes)) if locked else None
    job = prepare(read_recipe(recipes, overrides=overrides or (), output=output), device=device)
    if plan:
        _print_plan(job, out, err, as_json=as_json, every=every, probe=probe, quiet=quiet)
        return
    with joined() as here:
        if here.rank:
            follow(job)
            return
        if report is not None:
            check_report_file(report)
        check_files(metrics or (), job.recipe.output.path)
        for note in (*job.plan.notes, *warning_lines(job.plan)) if not quiet else ():
            err.print(note, markup=False)
        with progress_view(err, quiet=quiet) as view, metrics_to(metrics or ()) as logged:
            result = execute(job, overwrite=overwrite, lock=lock, fresh=fresh, observer=both(view, logged))
        for note in (*logged.failed, *([result.promise] if result.promise and not quiet else [])):
            err.print(note, markup=False, soft_wrap=True)
        if report is not None:
            write_report(report, result.report, output=result.output)
    _print_result(result, out, as_json=as_json, quiet=quiet)


def _check_flags(
    *, plan: bool, probe: bool, every: bool, locked: bool, metrics: list[str] | None, report: Path | None
) -> None:
    """Raise RecipeError for flags that do not go together."""
    if probe and not plan:
        raise RecipeError("--probe measures for a plan: give --plan, too")
    if every and not plan:
        raise RecipeError("--all lists the modules of a plan: give --plan, too")
    if plan and metrics:
        raise RecipeError("--metrics is of a run, and --plan of none: leave one of them out")
    if plan and report is not None:
        raise RecipeError("--report is of a run, and --plan of none: leave one of them out")
    if plan and locked:
        raise RecipeError(
            "--locked is of a run, and --plan of none: `armor lock RECIPE --check` compares without a run"
        )


def _print_result(result: Result, out: Console, *, as_json: bool, quiet: bool) -> None:
    from armor_recipes.cli.tables import result_json, summary

    if as_json:
        print(json.dumps(result_json(result), indent=2))
    elif not quiet:
        out.print(summary(result))


def _print_plan(job: Job, out: Console, err: Console, *, as_json: bool, every: bool, probe: bool, quiet: bool) -> None:
    from armor_recipes.cli.tables import plan_table, resolved_recipe
    from armor_recipes.cli.view import progress_view
    from armor_recipes.run.checks import check_places
    from armor_recipes.run.probing import probed
    from armor_recipes.run.settling import is_settled, settled_before

    check_places(job.source, job.recipe)
    if not is_settled(job):
        with progress_view(err, quiet=quiet) as view:
            job = settled_before(job, view)
    if probe:
        job = replace(job, estimate=probed(job))
    if as_json:
        found = {"plan": job.plan.to_dict(), "estimate": asdict(job.estimate), "recipe": job.recipe.resolved}
        print(json.dumps(found, indent=2))
    else:
        out.print(plan_table(job.plan, job.estimate, every=every))
        out.print(*resolved_recipe(job.recipe, every=every), sep="\n", soft_wrap=True)


def main() -> NoReturn:
    """Entry point of `armor-apply`."""
    run_command(app, name="armor-apply")
