"""`armor diff A B`: what differs between two runs' folders, from recipe to tensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from armor_recipes.checkpoint.diff import Diff, ModuleDiff, TensorDiff


def diff_command(
    first: Annotated[Path, typer.Argument(metavar="A", help="A checkpoint folder.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            min=0.0,
            help="Exit code 0, too, if but the machine differs, and layers by no more than this.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Say what differs between two folders, from recipe to tensors; exit code 6 if anything does (armor diff out/one out/two)."""
    from dataclasses import asdict

    from armor_recipes.checkpoint.diff import diff
    from armor_recipes.errors import VerificationError

    found = diff(first, second)
    if as_json:
        rows = {key: [each._asdict() for each in getattr(found, key)] for key in ("recipe", "run", "evaluation")}
        print(json.dumps({"equal": found.equal, **asdict(found), **rows}, indent=2))
    else:
        for line in _lines(found):
            print(line)
    if not (found.equal if tolerance is None else found.near(tolerance)):
        keys = len(found.recipe) + len(found.run) + len(found.evaluation)
        raise VerificationError(
            f"{first} and {second} differ in {keys} keys of recipe, run and evaluation, {len(found.modules)} layers and "
            f"{len(found.tensors)} other tensors"
        )


def _lines(found: Diff) -> list[str]:
    """A line for each thing that differs, or one that says that nothing does."""
    lines = [
        f"{section}: {each.key}: {each.first} | {each.second}"
        for section, rows in (("recipe", found.recipe), ("run", found.run), ("evaluation", found.evaluation))
        for each in rows
    ]
    lines += [f"{module.name}: {_module(module)}" for module in found.modules]
    lines += [f"{tensor.name}: {_tensor(tensor)}" for tensor in found.tensors]
    return lines or [f"nothing differs: {found.compared} layers and other tensors are equal byte for byte"]


def _module(module: ModuleDiff) -> str:
    said = []
    if module.groups is not None and module.masks is not None:
        said.append(f"masks of {module.masks} of {module.groups} groups ({100 * module.masks / module.groups:.2f} %)")
    if module.integers is not None:
        said.append(f"{module.integers} integers")
    distances = {"A": module.a, "S": module.s, "B": module.b, "weight": module.weight}
    said += [f"{name} by {distance:.3g}" for name, distance in distances.items() if distance is not None]
    return ", ".join(said) or "only in one of the two, or of other shapes"


def _tensor(tensor: TensorDiff) -> str:
    said = [tensor.reason] if tensor.reason else []
    said += [] if tensor.distance is None else [f"by {tensor.distance:.3g}"]
    said += [f"{tensor.zeros} zeros of one alone"] if tensor.zeros else []
    return ", ".join(said) or "other bytes"
