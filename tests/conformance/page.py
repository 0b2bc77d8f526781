"""Makes docs/modifiers.md and expected.json of runs of the whole matrix: `python -m tests.conformance.page`, `make modifiers`."""

from __future__ import annotations

import inspect
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers.utils import logging

from armor_recipes.modifiers import AnyModifier, Quantizer, modifiers
from tests.conformance.cases import CLAIMS, COLUMNS, EXPECTED, Case, cases, expected
from tests.conformance.checks import Dense, record
from tests.conformance.orders import orders

PAGE = Path(__file__).parents[2] / "docs/modifiers.md"
#: Fields that a recipe of the page has to give beside `targets`; for all others the defaults do.
GIVEN: dict[str, dict[str, Any]] = {
    "GPTQModifier": {"scheme": "W4A16"},
    "QuantizationModifier": {"scheme": "W4A16"},
    "SparseGPTModifier": {"pattern": "2:4"},
    "WandaPruningModifier": {"pattern": "2:4"},
    "ARMORModifier": {"block_size": 32},
}
TARGETS: dict[str, list[str]] = {"ChannelPermutationModifier": [r"re:.*mlp\.down_proj$"]}
CLAIMED = {
    "diagonal": "the errors of the weights, weighed by the squares of the inputs,",
    "outputs": "the errors of the outputs",
}
HEAD = """# Modifiers

What each modifier does, where it may stand, and what becomes of it on every kind of linear layer. `make modifiers` makes
this page of the code and of the runs that it tells of; tests compare both.

Each **row** is a recipe that the whole tool runs on a random model of one block: linear layers with and without biases,
stored in bf16 and in fp32; GPT-2's transposed `Conv1D`; and the experts of a mixture, to which tokens are routed
(Qwen3-MoE). A cell says how its modules are stored: `packed` (a 2:4 core and its factors), `quantized` (a format of
compressed-tensors) or `dense` (a plain weight). It does so only where all of this holds:

- every module that the targets match was taken, or left with a reason, and the bytes are those of the plan;
- patterns are exact, tensors have the model's dtype, and biases and all that is not targeted are as they were (in the
  new order, where channels were reordered; divided by the scales, where a smoother divides a layer's outputs);
- no loss ended above its start, and no method above the one that it is to beat;
- the folder loads here and in `from_pretrained` with the logits of the model in memory, bit for bit;
- the same recipe writes the same bytes again, what is loaded is saved as the same tensors, and the export to dense holds
  the weights in memory (tests marked `slow`).

Why a cell is `refused` or `left` stands below its table. **On the same modules** is the plan's answer for each two
modifiers, alone or with the one before or after them that they need.
"""


def main() -> None:
    """Run the matrix and write both files; with `--page` the page alone, of the records that there are."""
    if sys.argv[1:] == ["--page"]:
        PAGE.write_text(page(expected()), encoding="utf-8")
        return
    os.environ |= {"ARMOR_BACKEND": "folded", "HF_HUB_OFFLINE": "1"}
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = {"cells": {str(case): {} for case in cases()}, "orders": orders()}
    with tempfile.TemporaryDirectory() as folder:
        for number, column in enumerate(COLUMNS):
            dense = Dense.write(column, Path(folder) / str(number))
            for case in cases():
                made, _ = record(case, dense, Path(folder) / f"{number}-{case}")
                found["cells"][str(case)][column.name] = made.to_dict()
    EXPECTED.write_text(records(found), encoding="utf-8")
    PAGE.write_text(page(found), encoding="utf-8")


def records(found: Mapping[str, Any]) -> str:
    """The records as JSON, a line for each cell and pair."""
    parts = []
    for name, rows in found.items():
        lines = [
            f"  {json.dumps(row)}: {{\n"
            + ",\n".join(f"   {json.dumps(key)}: {json.dumps(cell, ensure_ascii=False)}" for key, cell in cells.items())
            + "\n  }"
            for row, cells in rows.items()
        ]
        parts.append(f" {json.dumps(name)}: {{\n" + ",\n".join(lines) + "\n }")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def page(found: Mapping[str, Any]) -> str:
    """The whole page."""
    sections = ["\n".join(section(name, kind, found)) for name, kind in modifiers().items()]
    return "\n".join([HEAD, *summary(found), *sections])


def summary(found: Mapping[str, Any]) -> Iterator[str]:
    """A line for each modifier, and how many cells there are of each outcome."""
    yield "| modifier | kind | what it does |"
    yield "|---|---|---|"
    for name, kind in modifiers().items():
        yield f"| [`{name}`](#{name.lower()}) | `{base(kind).__name__}` | {paragraph(kind)} |"
    outcomes = [cell["outcome"] for row in found["cells"].values() for cell in row.values()]
    counts = {outcome: outcomes.count(outcome) for outcome in ("right", "refused", "left")}
    yield f"\nOf {len(outcomes)} cells: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.items() if n) + ".\n"


def section(name: str, kind: type[AnyModifier[Any]], found: Mapping[str, Any]) -> Iterator[str]:
    """One modifier."""
    yield f"## {name}\n"
    yield f"{paragraph(kind)}\n\n{paragraph(kind.config_type)} Its fields: [the reference](recipe.md#{name.lower()}).\n"
    does = f"category `{kind.category}`" + "".join(f", `{trait}`" for trait in kind.traits)
    yield f"A `{base(kind).__name__}` ({does}): {paragraph(base(kind))}\n"
    own = [case for case in cases() if case.modifier == name]
    yield from table(own, found["cells"])
    if name in CLAIMS:
        other, measure = CLAIMS[name]
        yield f"In every column {CLAIMED[measure]} are no larger than with {other}.\n"
    yield "**On the same modules**\n"
    yield from places(name, found["orders"])
    yield f"\n```yaml\n{recipe(own[-1])}```\n"


def table(own: Sequence[Case], cells: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The rows of one modifier, and the reasons of what is not right."""
    names = [column.name for column in COLUMNS]
    yield f"| recipe | {' | '.join(names)} |"
    yield "|---|" + "---|" * len(names)
    reasons: dict[str, None] = {}
    for case in own:
        row = cells[str(case)]
        words = [", ".join(row[name].get("stored", [row[name]["outcome"]])) for name in names]
        yield f"| {str(case).replace(case.modifier, 'it', 1)} | {' | '.join(words)} |"
        for cell in row.values():
            if "reason" in cell:
                reason = cell["reason"].removeprefix(f"{case.modifier}: ")
                reasons[f"{cell['outcome']}: {reason}"] = None
    yield ""
    yield from (f"- {reason}" for reason in reasons)
    if reasons:
        yield ""


def places(name: str, answers: Mapping[str, Mapping[str, Mapping[str, str]]]) -> Iterator[str]:
    """Before and after which others it may stand, why not, and what the plan warns of."""
    after = {first: then[name] for first, then in answers.items() if name in then}
    for word, asked in (("before", answers[name]), ("after", after)):
        legal = [f"{other} (warned)" if "poor" in a else other for other, a in asked.items() if "refused" not in a]
        yield f"- {word}: {', '.join(legal) or 'none'}"
    for word, asked in (("not before", answers[name]), ("not after", after)):
        reasons: dict[str, list[str]] = {}
        for other, answer in asked.items():
            if "refused" in answer:
                text = answer["refused"].replace(other, "that one") if word == "not after" else answer["refused"]
                reasons.setdefault(shorter(text), []).append(other)
        yield from (f"- {word} {', '.join(others)}: {reason}" for reason, others in reasons.items())
    for first, answer in after.items():
        if "poor" in answer:
            yield f"- warned of after {first}: {answer['poor']}"


def shorter(reason: str) -> str:
    """A refusal without the advice at its end, and without what the page says before it."""
    text = re.sub(r"^cannot follow .* on …: ", "", reason.partition("; ")[0])
    return text.replace("… is already", "a module is already")


def recipe(case: Case) -> str:
    """A whole recipe on the embedded model."""
    group = {name: given(name) for name in (*case.before, case.modifier, *case.after)}
    data = {"dataset": "builtin:pydoc", "samples": 16, "sequence_length": 128}
    whole = {
        "model": "builtin:stdlib-llama",
        "calibration": data,
        "example_stage": {"example_modifiers": group},
        "output": {"path": "out/example"},
    }
    text: str = yaml.safe_dump(whole, sort_keys=False, default_flow_style=None, width=120)
    return text.replace("'builtin:pydoc'", "builtin:pydoc").replace("'preset:mlp'", "preset:mlp")


def given(name: str) -> dict[str, Any]:
    """The fields that a recipe of the page gives."""
    kind = modifiers()[name]
    asked = issubclass(kind, Quantizer) or kind.config_type.model_fields["targets"].is_required()
    targets = {"targets": TARGETS.get(name, ["preset:mlp"])} if asked else {}
    return {**targets, **GIVEN.get(name, {})}


def base(kind: type[AnyModifier[Any]]) -> type[Any]:
    """The class of its kind."""
    return next(one for one in kind.__mro__ if one.__module__.startswith("armor_recipes.modifiers.kinds."))


def paragraph(cls: type[Any]) -> str:
    """The first paragraph of a docstring, on one line."""
    return " ".join((inspect.getdoc(cls) or "").split("\n\n")[0].split())


if __name__ == "__main__":
    main()
