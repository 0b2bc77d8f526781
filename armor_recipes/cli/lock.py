"""`armor lock RECIPE…`: what a run of a recipe depends on, in a file beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from armor_recipes.cli.loading import loading


def lock_command(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE...", help="Recipe files or built-in names, as for armor-apply."),
    ],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B.C=VALUE", help="As for armor-apply; repeatable.")
    ] = None,
    output: Annotated[str | None, typer.Option("--output", help="As for armor-apply.")] = None,
    device: Annotated[str, typer.Option("--device", help="Where it will be computed: cpu, cuda, cuda:N.")] = "cpu",
    run: Annotated[
        Path | None,
        typer.Option("--from", metavar="FOLDER", help="An output of this recipe, whose tensors are locked."),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing: tell all that differs from the lock.")] = False,
) -> None:
    """Write RECIPE.lock.yaml for armor-apply --locked (armor lock quickstart --from out/quickstart)."""
    with loading():
        from armor_recipes.cli.quiet import quiet_libraries
        from armor_recipes.paths import user_path
        from armor_recipes.run import prepare
        from armor_recipes.run.job import read_recipe
        from armor_recipes.run.recipe_lock import lock_file, make_lock, read_lock

    quiet_libraries()
    file = lock_file(recipes)
    before = read_lock(file) if check else None
    job = prepare(read_recipe(recipes, overrides=overrides or (), output=output), device=device)
    lock = make_lock(job, file, output=None if before is not None and before.tensors else run)
    if before is not None:
        before.check(lock.content)
        if run is not None:
            before.check_output(user_path(run))
        print(f"{file} holds; it knows {len(before.tensors)} tensors" + (f", those of {run}" if run else ""))
        return
    lock.write()
    print(f"{file}: {len(lock.content.model.files)} files of the model, {len(lock.tensors)} tensors")
