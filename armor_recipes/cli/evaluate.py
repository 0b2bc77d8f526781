"""`armor eval MODEL`: perplexity of a model or checkpoint, or another measure."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from armor_recipes.evaluation import Evaluation

#: What perplexity and fidelity are measured on where nothing is named.
_TEXT = "builtin:pydoc-heldout"


def _not_empty(value: str | None) -> str | None:
    if value == "":
        raise typer.BadParameter("must not be empty")
    return value


class Bos(StrEnum):
    """How windows begin."""

    AUTO = "auto"
    NEVER = "never"


def eval_command(
    model: Annotated[
        str, typer.Argument(callback=_not_empty, help="A checkpoint folder, a model folder, a hub id, or builtin:NAME.")
    ],
    measure: Annotated[str, typer.Option(help="perplexity, fidelity, classification or retrieval.")] = "perplexity",
    against: Annotated[
        str | None, typer.Option(callback=_not_empty, help="The dense model to compare with; fidelity needs it.")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(callback=_not_empty, help="What to measure on: a file, a hub id, or builtin:NAME.")
    ] = None,
    split: Annotated[str | None, typer.Option(callback=_not_empty, help="Split of a hub dataset.")] = None,
    text_column: Annotated[str | None, typer.Option(callback=_not_empty, help="Column that holds the text.")] = None,
    sequence_length: Annotated[int | None, typer.Option(min=2, help="Tokens in a window or text.")] = None,
    bos: Annotated[
        Bos | None,
        typer.Option(help="Whether windows begin with what the tokenizer puts before a text, or never do."),
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Number of windows from the start; left out, all.")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any key of the measure; repeatable.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Measure perplexity, or what --measure says (armor eval out/quickstart --dataset notes.txt)."""
    from armor_recipes.cli.quiet import quiet_libraries
    from armor_recipes.run.measure import evaluate_model

    quiet_libraries()
    flags = {
        "dataset": dataset or (_TEXT if measure in ("perplexity", "fidelity") else None),
        "split": split,
        "text_column": text_column,
        "sequence_length": sequence_length,
        "bos": None if bos is None else bos.value,
        "windows": windows,
    }
    keys: dict[str, Any] = {key: value for key, value in flags.items() if value is not None}
    found = evaluate_model(model, measure, keys, overrides=overrides or (), against=against, device=device)
    print(json.dumps(_data(found, against), indent=2) if as_json else _words(found, against))


def _data(found: Evaluation, against: str | None) -> dict[str, Any]:
    """What `--json` prints."""
    from dataclasses import asdict

    from armor_recipes.evaluation import Perplexity
    from armor_recipes.report.evaluation import evaluation_json

    if against is None and isinstance(found.after, Perplexity):
        return asdict(found.after)
    return {"measure": found.name, "datasets": list(found.after.datasets), **evaluation_json([found])[found.name]}


def _words(found: Evaluation, against: str | None) -> str:
    """A line for each figure."""
    from armor_recipes.evaluation import Perplexity

    measured = found.after
    if against is None and isinstance(measured, Perplexity):
        size = f"{measured.tokens} tokens in {measured.windows} windows of {measured.dataset}"
        return f"perplexity {measured.value:.4f}  ({size})"
    dense = {} if found.before is None else {value.name: value.text() for value in found.before.values}
    lines = [f"{measured.size} of {' + '.join(measured.datasets)}"]
    for value in measured.values:
        before = f"{dense[value.name]} -> " if value.name in dense else ""
        lines.append(f"{value.name.replace('_', ' ')}: {before}{value.text()}")
    return "\n".join(lines)
