"""Chains of one recipe each on SmolLM2-135M: what a quantised core costs after ARMOR, with and without training around it.

    python benchmarks/chains.py --work FOLDER --text handbook=handbook.txt --text essays=essays.txt \\
        [--model models/smollm2-135m-instruct] [--windows 16] [--rows "armor,armor + int4"] [--results benchmarks/results/chains]

A row is one `armor-apply` run in a process of its own, and one JSON file; what exists is not made again. Its steps are joined by
` + `; the cost is the perplexity above that of the same chain without its quantisation, in per cent, with a 95 % interval from
1,000 bootstrap resamples of the windows. Text is held out, evenly spread. Cores with 8-bit activations run on the backend
`reference`, which rounds them.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from losses import Row, apply_apart, losses_of, read_texts, show
from quantized import DIGITS, HELD_OUT, above_float, backend_of
from quantizing import CORES
from torch import Tensor

import armor_recipes

TARGETS = r"re:.*(self_attn|mlp)\..*_proj$"
TEXTS = ("builtin:pydoc", "builtin:jargon", "builtin:speeches", "builtin:rustbook")
#: The steps of a chain by name: a modifier and its fields.
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "smooth": ("SmoothQuantModifier", {"smoothing_strength": 0.5}),
    "armor": (
        "ARMORModifier",
        {
            "targets": [TARGETS],
            "block_size": 64,
            "iterations": 30,
            "propagate": "dense",
            "calibration": {"samples": 32},
        },
    ),
    "distil": ("DistillationModifier", {}),
    **{name: ("QuantizationModifier", {"targets": [TARGETS], **fields}) for name, fields in CORES.items()},
    **{
        f"{name} hessian": ("QuantizationModifier", {"targets": [TARGETS], **CORES[name], "objective": "hessian"})
        for name in ("int4", "FP8_DYNAMIC")
    },
}
ROWS = (
    "armor",
    "armor + int4",
    "armor + int4 hessian",
    "armor + W8A8",
    "armor + FP8_DYNAMIC",
    "smooth + armor",
    "smooth + armor + W8A8",
    "armor + distil",
    "armor + int4 + distil",
    "armor + int4 hessian + distil",
    "armor + distil + int4 hessian + distil",
    "armor + W8A8 + distil",
    "armor + FP8_DYNAMIC + distil",
    "armor + FP8_DYNAMIC hessian",
    "armor + FP8_DYNAMIC hessian + distil",
)


def recipe_of(row: str, model: str, samples: int, output: Path) -> dict[str, Any]:
    """The row's recipe; `samples` windows of 512 tokens for the distillation, at most 64 of them for the quantisation.

    A step that repeats is in a stage of its own, with what quantises before it. So is a quantisation after smoothing: within one
    stage activations are smoothed as the layers before, quantised already, leave them, and ARMOR would not be the other row's.
    """
    stages: list[dict[str, Any]] = [{}]
    steps = row.split(" + ")
    for place, name in enumerate(steps):
        kind, fields = STEPS[name]
        own = {"calibration": {"samples": min(samples, 64)}} if kind == "QuantizationModifier" else {}
        if own and "smooth" in steps:
            stages.append({})
        stages[-1][kind] = {**fields, **own}
        if name == "distil" and name in steps[place + 1 :]:
            stages.append({})
    texts = [{"dataset": text, "weight": 1} for text in TEXTS]
    return {
        "model": model,
        "calibration": {"dataset": texts, "samples": samples, "sequence_length": 512, "batch_size": 1},
        **{f"{name}_stage": {"chain_modifiers": stage} for name, stage in zip(("prune", "tune"), stages, strict=False)},
        "output": {"path": str(output)},
    }


def without_quantisation(row: str) -> str:
    """The row that a row is compared with: what the same steps give before the first quantisation, or without any after it."""
    steps = row.split(" + ")
    first = next((place for place, name in enumerate(steps) if STEPS[name][0] == "QuantizationModifier"), len(steps))
    return " + ".join(dict.fromkeys(name for name in steps if name in steps[:first] or name == "distil"))


def run_row(row: str, model: str, samples: int, work: Path, texts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Apply the row's recipe in a process of its own unless its folder is there, and measure what it wrote."""
    folder, file = work / file_name(row), work / f"{file_name(row)}.yaml"
    if not folder.exists():
        work.mkdir(parents=True, exist_ok=True)
        apply_apart(f"row {row!r}", recipe_of(row, model, samples, folder), file)
    manifest, figures = (json.loads((folder / name).read_text()) for name in ("armor_manifest.json", "report.json"))
    loaded = armor_recipes.load(folder, backend=backend_of(folder), dtype=torch.float32)
    found = {
        "row": row,
        "recipe": yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")),
        "losses": losses_of(loaded, texts),
        "bytes": manifest["totals"]["bytes_after"] / manifest["totals"]["bytes_before"],
        "refinements": manifest["refinements"],
        "seconds": figures["seconds"],
    }
    shutil.rmtree(folder)
    return found


def file_name(row: str) -> str:
    """The row's name without blanks."""
    return row.replace(" + ", "+").replace(" ", "-")


def summary(rows: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The table's rows."""
    return [
        {
            "chain": name,
            **above_float(row, rows.get(without_quantisation(name))),
            "bytes": row["bytes"],
            "seconds": row["seconds"],
        }
        for name, row in rows.items()
    ]


def main() -> None:
    """Run the rows that are missing, then print the table of all that exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/smollm2-135m-instruct")
    parser.add_argument("--work", type=Path, required=True, help="where a row's folder lies while it is measured")
    parser.add_argument("--samples", type=int, default=128, help="calibration windows")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=PATH", help="beside builtin:pydoc-heldout")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--rows", default=",".join(ROWS), help="names, separated by commas; `none` only prints")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/chains"))
    parser.add_argument("--json", type=Path, help="also write the table's rows there")
    options = parser.parse_args()
    wanted = [] if options.rows == "none" else options.rows.split(",")
    if not set(ROWS) >= set(wanted):
        parser.error(f"unknown rows in {options.rows!r}; rows are: {', '.join(ROWS)}")
    options.results.mkdir(parents=True, exist_ok=True)
    texts = read_texts([HELD_OUT, *options.text], options.model, windows=options.windows, length=512)
    for row in wanted:
        file = options.results / f"{file_name(row)}.json"
        if not file.exists():
            print(f"{row} …", flush=True)
            found = run_row(row, options.model, options.samples, options.work, texts)
            file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    rows = {r["row"]: r for r in (json.loads(f.read_text(encoding="utf-8")) for f in options.results.glob("*.json"))}
    show(summary({name: rows[name] for name in ROWS if name in rows}), DIGITS, options.json)


if __name__ == "__main__":
    main()
