"""`armor init`: a first recipe for a model, by three questions or their flags."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from armor_recipes.cli.flags import not_empty
from armor_recipes.cli.loading import loading

_FLAGS = {"model": "--model", "calibration": "--calibration", "block_size": "--block-size"}


def _ask(question: str, **options: Any) -> Any:
    """The answer to a question on the terminal. Raises KeyboardInterrupt, and RecipeError where the input ends."""
    from armor_recipes.errors import RecipeError

    try:
        return typer.prompt(question, err=True, **options)
    except typer.Abort as error:  # typer's word for both ends
        if isinstance(error.__context__, EOFError):
            raise RecipeError(
                f"the input ended before all was answered: give {', '.join(_FLAGS.values())} in the place of answers"
            ) from error
        raise KeyboardInterrupt from error


def init_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The recipe to write.")] = Path("recipe.yaml"),
    model: Annotated[
        str | None, typer.Option("--model", callback=not_empty, help="A folder, a hub id, or builtin:NAME.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="TEXT",
            callback=not_empty,
            help="A file, a hub id, builtin:NAME, or mix: the package's texts.",
        ),
    ] = None,
    block_size: Annotated[
        int | None, typer.Option("--block-size", metavar="N", min=1, help="Size of the blocks of A and B.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing file.")] = False,
) -> None:
    """Write a commented recipe for a model; asks for what flags leave out (armor init my.yaml --model builtin:stdlib-llama)."""
    with loading():
        from armor_recipes.cli.quiet import quiet_libraries
        from armor_recipes.errors import ArmorError, RecipeError
        from armor_recipes.run.starting import check_recipe_file, dataset_for, look, recipe_text, write_recipe

    quiet_libraries()
    given = {"model": model, "calibration": calibration, "block_size": block_size}
    missing = [_FLAGS[name] for name, value in given.items() if value is None]
    if missing and not sys.stdin.isatty():
        raise RecipeError(f"standard input is no terminal that could be asked: give {', '.join(missing)}, too")
    place = check_recipe_file(file, overwrite=overwrite)
    start = look(model or _ask("1. Model (a folder, a hub id, or builtin:NAME)"))
    if missing:
        typer.echo("\n".join(f"   {line}" for line in start.lines()), err=True)

    def dataset_of(answer: str) -> str:
        try:
            return dataset_for(place, answer)
        except ArmorError as error:  # is told, and asked again
            raise typer.BadParameter(str(error)) from error

    if calibration is not None:
        data = dataset_for(place, calibration)
    else:
        question = "2. Calibrate on (a file, a hub id, builtin:NAME, or mix: the package's texts)"
        data = _ask(question, default=start.calibration, value_proc=dataset_of)
    sizes = {str(size.block): size.block for size in start.sizes}

    def size_of(answer: str) -> int:
        if answer not in sizes:  # is told, and asked again
            raise typer.BadParameter(f"give one of {', '.join(sizes)}")
        return sizes[answer]

    block = block_size or _ask("3. Block size", default=str(start.block_size), value_proc=size_of)
    write_recipe(place, recipe_text(start, calibration=data, block_size=block))
    named = f"./{file}" if str(file).startswith("-") else str(file)  # or it would be read as a flag
    print(f"{file} is written; next: armor-apply {shlex.quote(named)} --plan")
