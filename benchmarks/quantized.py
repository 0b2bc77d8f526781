"""What rounded values of S cost: perplexity of one ARMOR checkpoint with a float core and with cores of 8 and 4 bits.

    python benchmarks/quantized.py --checkpoint out/smollm2-135m-armor --work FOLDER \\
        [--text handbook=handbook.txt] [--samples 64] [--rows float,int8] [--results benchmarks/results/quantized] [--json FILE]

Every row but `float` is a run of `QuantizationModifier` on the factors that the checkpoint stores, with the calibration of the
recipe that made it (`--samples`: fewer windows of it). Folders are kept in `--work` under the row's name, and a row is one JSON
file; what exists is not made again. Text is held out: from each, `--windows` windows of `--length` tokens, evenly spread.

The cost is the perplexity above that of the float core, in per cent, with a 95 % interval from 1,000 bootstrap resamples of the
windows (the same for every row). `loss` is the mean over modules of the squared error of A · S · B against that of the float core,
weighted by the mean square of each input and relative to 0, after rounding to the stored dtype.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from losses import Row, compared, losses_of, read_texts, show
from quantizing import CORES, calibration_of, quantise
from torch import Tensor

import armor_recipes
from armor_recipes.checkpoint.export import Source
from armor_recipes.checkpoint.reader import inspect

BASE = "float"
#: Fields of `QuantizationModifier`; None for the checkpoint as it is.
ROWS: dict[str, dict[str, Any] | None] = {
    BASE: None,
    "int8": CORES["int8"],
    "int8 without re-solve": {**CORES["int8"], "resolve": False, "rounding": "nearest"},
    "int4": CORES["int4"],
    "int4 hessian": {**CORES["int4"], "objective": "hessian"},
    "int4 hessian gptq": {**CORES["int4"], "objective": "hessian", "rounding": "gptq"},
    "int4 nearest": {**CORES["int4"], "rounding": "nearest"},
    "int4 nearest without gauge": {**CORES["int4"], "rounding": "nearest", "gauge": False},
    "int4 without re-solve": {**CORES["int4"], "resolve": False, "rounding": "nearest", "gauge": False},
    "W8A8": CORES["W8A8"],
    "W8A8 without gauge": {**CORES["W8A8"], "gauge": False},
    "FP8_DYNAMIC": CORES["FP8_DYNAMIC"],
}
#: How numbers of a column are printed, by the last word of its name.
DIGITS = {"perplexity": ".2f", "percent": ".2f", "bytes": ".3f", "loss": ".2e", "seconds": ".0f"}
HELD_OUT = "pydoc-heldout=builtin:pydoc-heldout"


def run_row(row: str, checkpoint: Path, work: Path, samples: int | None, texts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Make the row's folder unless it is there, and measure it."""
    fields, folder = ROWS[row], checkpoint
    if fields is not None:
        folder = work / file_name(row)
        if not folder.exists():
            work.mkdir(parents=True, exist_ok=True)
            quantise(checkpoint, folder, fields, calibration_of(checkpoint, samples=samples))
    manifest = json.loads((folder / "armor_manifest.json").read_text(encoding="utf-8"))
    changes = [change for module in manifest["modules"].values() for change in module.get("changes", ())]
    layers = inspect(folder).layers
    return {
        "row": row,
        "fields": fields,
        "calibration": manifest["calibration"],
        "losses": losses_of(armor_recipes.load(folder, backend=backend_of(folder), dtype=torch.float32), texts),
        "bytes": sum(layer.nbytes for layer in layers) / sum(layer.dense_nbytes for layer in layers),
        "mean_loss": statistics.fmean(change["stored_loss"] for change in changes) if changes else 0.0,
    }


def backend_of(folder: Path) -> str:
    """`reference` where activations are rounded as well, which no folded weight does."""
    return "reference" if any(spec.activations for spec in Source.open(folder).specs.values()) else "folded"


def file_name(row: str) -> str:
    """The row's name without blanks."""
    return row.replace(" ", "-")


def summary(rows: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The table's rows; none as long as there is no float core to compare with."""
    return [
        {"core": name, **above_float(row, rows[BASE]), "bytes": row["bytes"], "loss": row["mean_loss"]}
        for name, row in rows.items()
        if BASE in rows
    ]


def above_float(row: Mapping[str, Any], base: Mapping[str, Any] | None) -> Row:
    """Cells of the texts: perplexity, and by how many per cent it is above the base's."""
    cells: Row = {}
    for text, own in row["losses"].items():
        perplexity, _, percent = compared(own, own if base is None else base["losses"][text])
        cells |= {f"{text} perplexity": perplexity, f"{text} percent": None if base in (None, row) else percent}
    return cells


def main() -> None:
    """Run the rows that are missing, then print the table of all that exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="an ARMOR folder with a float core")
    parser.add_argument("--work", type=Path, required=True, help="where quantised folders are made")
    parser.add_argument("--samples", type=int, help="calibration windows; left out, as many as the recipe says")
    parser.add_argument("--text", action="append", default=[], metavar="NAME=PATH", help="beside builtin:pydoc-heldout")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rows", default=",".join(ROWS), help="names, separated by commas; `none` only prints")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/quantized"))
    parser.add_argument("--json", type=Path, help="also write the table's rows there")
    options = parser.parse_args()
    wanted = [] if options.rows == "none" else options.rows.split(",")
    if not ROWS.keys() >= set(wanted):
        parser.error(f"unknown rows in {options.rows!r}; rows are: {', '.join(ROWS)}")
    folder = options.results / options.checkpoint.resolve().name
    folder.mkdir(parents=True, exist_ok=True)
    texts = read_texts([HELD_OUT, *options.text], options.checkpoint, windows=options.windows, length=options.length)
    for row in wanted:
        file = folder / f"{file_name(row)}.json"
        if not file.exists():
            print(f"{row} …", flush=True)
            found = run_row(row, options.checkpoint, options.work, options.samples, texts)
            file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    rows = {r["row"]: r for r in (json.loads(f.read_text(encoding="utf-8")) for f in folder.glob("*.json"))}
    show(summary({name: rows[name] for name in ROWS if name in rows}), DIGITS, options.json)


if __name__ == "__main__":
    main()
