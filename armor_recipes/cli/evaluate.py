"""`armor eval MODEL`: perplexity of a model or checkpoint."""

from __future__ import annotations

import json
from enum import StrEnum
from typing import Annotated

import typer


def _not_empty(value: str) -> str:
    if not value:
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
    dataset: Annotated[
        str, typer.Option(callback=_not_empty, help="Text to measure on: a file, a hub id, or builtin:NAME.")
    ] = "builtin:pydoc-heldout",
    split: Annotated[str, typer.Option(callback=_not_empty, help="Split of a hub dataset.")] = "test",
    text_column: Annotated[str, typer.Option(callback=_not_empty, help="Column that holds the text.")] = "text",
    sequence_length: Annotated[int, typer.Option(min=2, help="Tokens in a window.")] = 512,
    bos: Annotated[
        Bos, typer.Option(help="Whether windows begin with what the tokenizer puts before a text, or never do.")
    ] = Bos.AUTO,
    windows: Annotated[int | None, typer.Option(min=1, help="Number of windows from the start; left out, all.")] = None,
    device: Annotated[str, typer.Option(help="Where to compute.")] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Measure token-level perplexity (armor eval out/quickstart --dataset notes.txt)."""
    from dataclasses import asdict

    from armor_recipes.cli.quiet import quiet_libraries
    from armor_recipes.recipe.schema import PerplexitySpec
    from armor_recipes.run.measure import evaluate_model

    quiet_libraries()
    spec = PerplexitySpec(
        dataset=dataset,
        split=split,
        text_column=text_column,
        sequence_length=sequence_length,
        bos="never" if bos is Bos.NEVER else "auto",
        windows=windows,
    )
    measured = evaluate_model(model, spec, device=device)
    if as_json:
        print(json.dumps(asdict(measured), indent=2))
    else:
        print(
            f"perplexity {measured.value:.4f}  ({measured.tokens} tokens in {measured.windows} windows of {measured.dataset})"
        )
