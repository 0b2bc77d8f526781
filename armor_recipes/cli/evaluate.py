"""`armor eval MODEL`: perplexity of a model or checkpoint, another measure, or tasks of lm-eval."""

from __future__ import annotations

import json
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armor_recipes.cli.flags import not_empty
from armor_recipes.cli.loading import loading

if TYPE_CHECKING:
    from armor_recipes.evaluation import Evaluation, Measured, Value

#: What is measured on where nothing is named.
_DATASETS = {
    "perplexity": {"dataset": "builtin:pydoc-heldout"},
    "fidelity": {"dataset": "builtin:pydoc-heldout"},
    "multiple_choice": {"dataset": "builtin:continuations"},
}


class Preset(StrEnum):
    """Whose procedure is reproduced."""

    WIKITEXT2 = "wikitext2"
    C4 = "c4"


class Bos(StrEnum):
    """How windows begin."""

    AUTO = "auto"
    ONCE = "once"
    NEVER = "never"


def eval_command(
    model: Annotated[
        str, typer.Argument(callback=not_empty, help="A checkpoint folder, a model folder, a hub id, or builtin:NAME.")
    ],
    measure: Annotated[
        str, typer.Option(help="perplexity, fidelity, classification, retrieval, multiple_choice or speed.")
    ] = "perplexity",
    preset: Annotated[
        Preset | None, typer.Option(help="Perplexity as the usual scripts measure it, on that text or on --dataset.")
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(callback=not_empty, help="Tasks of lm-eval, between commas, in the place of a measure."),
    ] = None,
    include: Annotated[Path | None, typer.Option(help="A folder of tasks of your own, for --tasks.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Samples of each task, from the start; left out, all.")
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            callback=not_empty,
            help="The dense model to compare with, or what --json said of it in a file NAME.json; fidelity needs it.",
        ),
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(callback=not_empty, help="What to measure on: a file, a hub id, or builtin:NAME.")
    ] = None,
    split: Annotated[str | None, typer.Option(callback=not_empty, help="Split of a hub dataset.")] = None,
    text_column: Annotated[str | None, typer.Option(callback=not_empty, help="Column that holds the text.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=2, help="Tokens in a window or text.")] = None,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Tokens from one window to the next; left out, windows do not overlap.")
    ] = None,
    bos: Annotated[
        Bos | None,
        typer.Option(help="What begins as the tokenizer begins a text: each window, the whole text once, or none."),
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Number of windows from the start; left out, all.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the measure; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Measure perplexity, or what --measure says (armor eval out/quickstart --dataset notes.txt)."""
    with loading():
        from rich.console import Console

        from armor_recipes.cli.quiet import quiet_libraries
        from armor_recipes.cli.view import progress_view
        from armor_recipes.errors import RecipeError
        from armor_recipes.report.machine import machine_class
        from armor_recipes.report.saved import saved_dict
        from armor_recipes.run.measure import evaluate_model, evaluate_tasks

    quiet_libraries()
    flags = {
        "dataset": dataset,
        "split": split,
        "text_column": text_column,
        "sequence_length": sequence_length,
        "stride": stride,
        "bos": None if bos is None else bos.value,
        "windows": windows,
    }
    keys: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    if tasks is not None:
        if keys or preset or overrides or measure != "perplexity":
            raise RecipeError("--tasks hands over to lm-eval, which takes no flags of a measure: leave those out")
        found = evaluate_tasks(model, tasks.split(","), include=include, limit=limit, against=against, device=device)
    elif include is not None or limit is not None:
        raise RecipeError("--include and --limit go with --tasks: give that, or leave them out")
    else:
        default = {} if preset is not None else _DATASETS.get(measure, {})
        with progress_view(Console(stderr=True), quiet=False, phases=False) as view:
            found = evaluate_model(
                model,
                measure,
                default,
                flags=keys,
                preset=None if preset is None else preset.value,
                overrides=overrides or (),
                against=against,
                device=device,
                observer=view,
            )
    if as_json:
        saved = saved_dict(found, model, machine_class(device))
        print(json.dumps({**_data(found, against), **saved}, indent=2))
    else:
        print(_words(found, against))


def _data(found: Evaluation, against: str | None) -> dict[str, Any]:
    """What `--json` prints."""
    from armor_recipes.evaluation import Perplexity

    measured = found.after
    if against is None and isinstance(measured, Perplexity):
        keys = ("value", "nll", "tokens", "windows", "dataset", "sha256", "bos")
        return {**{key: getattr(measured, key) for key in keys}, "figures": _figures(measured.figures)}
    return {
        "measure": found.name,
        "datasets": list(measured.datasets),
        "before": None if found.before is None else _plain(found.before),
        "after": _plain(measured),
        "differences": _figures(found.differences),
    }


def _plain(measured: Measured) -> dict[str, Any]:
    """As the manifest has it, and what it leaves out."""
    more = measured.figures != measured.values
    return {**measured.to_dict(), **({"figures": _figures(measured.figures)} if more else {})}


def _figures(values: Iterable[Value]) -> dict[str, Any]:
    return {value.name: value.to_dict() for value in values}


def _words(found: Evaluation, against: str | None) -> str:
    """A line for each figure."""
    from armor_recipes.evaluation import Perplexity

    measured = found.after
    figures = list(measured.figures)
    lines = [f"{measured.size} of {' + '.join(measured.datasets)}"]
    if against is None and isinstance(measured, Perplexity):
        size = f"{measured.tokens} tokens in {measured.windows} windows of {measured.dataset}"
        lines = [f"perplexity {figures.pop(0).text()}  ({size})"]
    dense = {} if found.before is None else {value.name: value.text() for value in found.before.figures}
    for value in figures:
        before = f"{dense[value.name]} -> " if value.name in dense else ""
        lines.append(f"{value.name.replace('_', ' ')}: {before}{value.text()}")
    lines += [f"{value.name.replace('_', ' ')}: {value.text()}" for value in found.differences]
    return "\n".join(lines)
