"""`armor VERB`: everything that is not running a recipe."""

from __future__ import annotations

from typing import NoReturn

import typer

from armor_recipes.cli.check import check_command
from armor_recipes.cli.convert import convert_command
from armor_recipes.cli.diff import diff_command
from armor_recipes.cli.doctor import doctor_command
from armor_recipes.cli.evaluate import eval_command
from armor_recipes.cli.export import export_command
from armor_recipes.cli.flags import Version
from armor_recipes.cli.guard import run_command
from armor_recipes.cli.init import init_command
from armor_recipes.cli.inspect import inspect_command
from armor_recipes.cli.lock import lock_command
from armor_recipes.cli.recipes import recipes_command
from armor_recipes.cli.report import report_command
from armor_recipes.cli.schema import schema_command
from armor_recipes.cli.status import status_command
from armor_recipes.cli.sweep import sweep_command
from armor_recipes.cli.verify import verify_command

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def common(*, version: Version = False) -> None:
    """Look at, measure, check and convert models and recipes. To run a recipe: armor-apply."""


app.command("eval")(eval_command)
app.command("sweep")(sweep_command)
app.command("inspect")(inspect_command)
app.command("export")(export_command)
app.command("check")(check_command)
app.command("lock")(lock_command)
app.command("status")(status_command)
app.command("verify")(verify_command)
app.command("diff")(diff_command)
app.command("report")(report_command)
app.command("schema")(schema_command)
app.command("recipes")(recipes_command)
app.command("convert")(convert_command)
app.command("doctor")(doctor_command)
app.command("init")(init_command)


def main() -> NoReturn:
    """Entry point of `armor`."""
    run_command(app, name="armor")
