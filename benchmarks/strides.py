"""What distillation loses where logits are compared at every n-th token alone (`logit_stride`), on the embedded model.

    python benchmarks/strides.py --text handbook=handbook.txt --text essays=essays.txt [--windows 48] [--samples 64] \\
        [--strides 1,2,4,8] [--results benchmarks/results/strides]

A row is one `armor-apply` run in a process of its own and one JSON file; rows that exist are not run again. Steps and windows are
the same in all of them. Loss is in nats a token on held-out text, evenly spread; differences are to the row of every token, with
95 % intervals from 1,000 bootstrap resamples of the windows.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from losses import Row, apply_apart, compared, losses_of, read_texts, show
from torch import Tensor

import armor_recipes
from armor_recipes.integrations.models import open_model
from armor_recipes.recipe.schema import ModelSpec

MODEL, LENGTH = "builtin:stdlib-llama", 256


def recipe_of(stride: int | None, samples: int, output: Path) -> dict[str, Any]:
    """ARMOR at block 32, then distillation with this stride; None for no distillation."""
    modifiers: dict[str, Any] = {
        "ARMORModifier": {"targets": [r"re:.*(self_attn|mlp)\..*_proj$"], "block_size": 32, "iterations": 30}
    }
    if stride is not None:
        modifiers["DistillationModifier"] = {"logit_stride": stride}
    return {
        "model": MODEL,
        "calibration": {"dataset": "builtin:pydoc", "samples": samples, "sequence_length": LENGTH},
        "prune_stage": {"armor_modifiers": modifiers},
        "output": {"path": str(output)},
    }


def run_row(stride: int | None, samples: int, texts: dict[str, Tensor]) -> dict[str, Any]:
    """Apply the row's recipe and measure what it wrote."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "out"
        apply_apart(f"stride {stride}", recipe_of(stride, samples, folder), Path(place) / "recipe.yaml")
        losses = losses_of(armor_recipes.load(folder, backend="reference", dtype=torch.float32), texts)
        seconds = json.loads((folder / "report.json").read_text(encoding="utf-8"))["seconds"]
    return {"stride": stride, "losses": losses, "seconds": seconds}


def summary(rows: dict[str, dict[str, Any]]) -> list[Row]:
    """The table's rows."""
    table: list[Row] = []
    for name, row in rows.items():
        cells: Row = {"logits compared at": name}
        for text, own in row["losses"].items():
            base = rows["every token"]
            cells[f"{text} loss"] = fmean(own)
            cells[f"{text} more"] = None if row is base else compared(own, base["losses"][text])[1]
        table.append({**cells, "seconds": row["seconds"]})
    return table


def main() -> None:
    """Run the rows that are missing, then print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", action="append", required=True, help="NAME=FILE, more than once")
    parser.add_argument("--windows", type=int, default=48, help="of each text")
    parser.add_argument("--samples", type=int, default=64, help="windows to calibrate and to distil on")
    parser.add_argument("--strides", default="1,2,4,8", help="the first is 1")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/strides"))
    parser.add_argument("--json", type=Path, help="also write the table's rows there")
    options = parser.parse_args()
    source = open_model(ModelSpec(id=MODEL), device=torch.device("cpu"))
    texts = read_texts(options.text, str(source.folder), windows=options.windows, length=LENGTH)
    strides = [int(part) for part in options.strides.split(",")]
    labels = {1: "every token", 2: "every 2nd", None: "no distillation"}
    rows = {}
    for stride in (*strides, None):
        file = options.results / f"{stride}-{options.samples}.json"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps(run_row(stride, options.samples, texts)), encoding="utf-8")
        rows[labels.get(stride, f"every {stride}th")] = json.loads(file.read_text(encoding="utf-8"))
    show(summary(rows), {"loss": ".4f", "more": ".4f", "seconds": ".0f"}, options.json)


if __name__ == "__main__":
    main()
