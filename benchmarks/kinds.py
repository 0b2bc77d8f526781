"""What plain 2:4, ARMOR and refinement leave of models that predict no text: a sentence encoder and a vision transformer.

    make fetch-minilm train-vit
    python benchmarks/kinds.py --task sentences [--block 32] [--rows '2:4,armor 32'] [--results benchmarks/results/kinds]
    python benchmarks/kinds.py --task digits --block 8 16 32

A row is one `armor-apply` run in a process of its own, and one JSON file with its recipe; rows that exist are not run again. The
row `dense` is what a run measures before it changes anything. `lost` is the share of what plain 2:4 loses that a row loses.

`sentences`: all-MiniLM-L6-v2, calibrated on windows of 128 tokens, three kinds of text in equal parts. A query is the first half
of a paragraph of a book that it was not calibrated on (`builtin:rustbook`), the document its second half, among those of all.
`digits`: the model of tools/train_vit.py, calibrated on images that it was trained on; accuracy on others.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from losses import Row, apply_apart, bootstrap, interval, show
from torch import Tensor
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer

import armor_recipes
from armor_recipes.builtin import documents
from armor_recipes.evaluation.retrieval import pooled, ranks_of

Section = dict[str, Any]
#: Paragraphs are halved at the end of a sentence; each half has so many characters at least.
HALF, PAIRS = 100, 1000
#: The row whose loss the others' are compared with.
BASE = "2:4"


@dataclass(frozen=True, slots=True)
class Task:
    """A model, what it is calibrated on, what is measured, and the figure by which a loss is told.

    `more(checkpoint, folder)` measures what no section of a recipe does.
    """

    model: str
    targets: str
    calibration: Section
    evaluation: Callable[[Path], Section]
    figure: str
    more: Callable[[Path, Path], Section] | None = None


def halves(paragraph: str) -> tuple[str, str] | None:
    """The paragraph's sentences in two parts, as equal as they can be; None where one would be short."""
    ends = [i + 1 for i in range(len(paragraph) - 1) if paragraph[i : i + 2] == ". "]
    middle = min(ends, key=lambda end: abs(2 * end - len(paragraph)), default=0)
    first, second = paragraph[:middle].strip(), paragraph[middle:].strip()
    return (first, second) if min(len(first), len(second)) >= HALF else None


def pairs() -> list[dict[str, str]]:
    """`PAIRS` halved paragraphs, evenly spread over the book."""
    found = [both for text in documents("rustbook") for p in text.split("\n\n") if (both := halves(p)) is not None]
    picked = [found[i * len(found) // PAIRS] for i in range(PAIRS)]
    return [{"query": query, "document": document} for query, document in picked]


def sentences(folder: Path) -> Section:
    """Retrieval on the pairs, and how near hidden states are to the dense ones."""
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs()), encoding="utf-8")
    return {
        "retrieval": {"dataset": str(file.resolve()), "sequence_length": 256, "batch_size": 32},
        "fidelity": {"dataset": "builtin:rustbook", "split": "train", "samples": 64, "sequence_length": 128},
    }


def embedded(model: Any, texts: Sequence[str]) -> Tensor:
    """Embeddings `(N, H)` of length 1, float64: means of the last hidden states."""
    tokenizer: Any = AutoTokenizer.from_pretrained(TASKS["sentences"].model)
    rows = []
    with torch.inference_mode():
        for text in texts:
            inputs = tokenizer(text, truncation=True, max_length=256, return_tensors="pt")
            rows.append(pooled(model(**inputs).last_hidden_state, "mean")[0])
    return functional.normalize(torch.stack(rows), dim=1)


def beside_dense(checkpoint: Path, folder: Path) -> Section:
    """Cosines of queries' embeddings to the dense model's, and retrieval by them of documents that the dense model embedded."""
    pairs_ = [json.loads(line) for line in (folder / "pairs.jsonl").read_text(encoding="utf-8").splitlines()[::4]]
    queries, there = ([pair[key] for pair in pairs_] for key in ("query", "document"))
    dense: Any = AutoModel.from_pretrained(TASKS["sentences"].model)
    index, right = embedded(dense, there), torch.arange(len(pairs_))
    before, after = embedded(dense, queries), embedded(armor_recipes.load(checkpoint), queries)
    hits = [(ranks_of(asked, index, right) == 1).double() for asked in (before, after)]
    return {
        "before": {"recall_at_1_in_dense_index": mean(hits[0])},
        "after": {"recall_at_1_in_dense_index": mean(hits[1]), "embedding_cosine": mean((before * after).sum(1))},
    }


def mean(values: Tensor) -> Section:
    """The mean of `(N,)` and its interval."""
    return {"value": float(values.mean()), "interval": list(interval(bootstrap(values)))}


def digits(_: Path) -> Section:
    """Accuracy, and how near logits are to the dense ones."""
    held_out = str(Path("models/digits-vit/heldout.safetensors").resolve())
    images = str(Path("models/digits-vit/calibration.safetensors").resolve())
    return {
        "classification": {"dataset": held_out, "batch_size": 64},
        "fidelity": {"dataset": images, "split": "train", "samples": 256},
    }


TASKS: dict[str, Task] = {
    "sentences": Task(
        "models/all-minilm-l6-v2",
        r"re:encoder\.layer\.\d+\.(attention\.self\.(query|key|value)|(attention\.)?(output|intermediate)\.dense)$",
        {
            "dataset": [{"dataset": f"builtin:{text}", "weight": 1} for text in ("pydoc", "jargon", "speeches")],
            "samples": 96,
            "sequence_length": 128,
        },
        sentences,
        "embedding_cosine",
        beside_dense,
    ),
    "digits": Task(
        "models/digits-vit",
        r"re:vit\.layers\.\d+\.(attention|mlp)\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)$",
        {"dataset": str(Path("models/digits-vit/calibration.safetensors").resolve()), "samples": 512, "batch_size": 32},
        digits,
        "top1_accuracy",
    ),
}


def rows(blocks: Sequence[int]) -> dict[str, Section]:
    """The modifiers of each row; their targets are the task's."""
    refine = {"epochs": 8, "calibration": {"batch_size": 8}}
    found: dict[str, Section] = {"2:4 by magnitude": {"MagnitudeModifier": {}}, "2:4": {"NoWagModifier": {}}}
    for block in blocks:
        armor = {"block_size": block, "propagate": "dense"}
        found[f"armor {block}"] = {"ARMORModifier": armor}
        found[f"armor {block} + refinement"] = {"ARMORModifier": armor, "BlockRefineModifier": refine}
    return found


def recipe_of(task: Task, modifiers: Section, folder: Path, output: Path) -> Section:
    """The recipe of a row."""
    own = {
        name: fields if "Refine" in name else {"targets": [task.targets], **fields}
        for name, fields in modifiers.items()
    }
    return {
        "model": task.model,
        "calibration": task.calibration,
        "prune_stage": {"row_modifiers": own},
        "output": {"path": str(output)},
        "evaluation": task.evaluation(folder),
    }


def run_row(row: str, recipe: Section, output: Path) -> dict[str, Any]:
    """Apply the recipe in a process of its own; what its manifest and report say."""
    apply_apart(f"row {row!r}", recipe, output.with_suffix(".yaml"))
    manifest, timed = (json.loads((output / f).read_text()) for f in ("armor_manifest.json", "report.json"))
    kept = {name: manifest[name] for name in ("evaluation", "totals", "refinements")}
    return {"row": row, "recipe": recipe, **kept, "seconds": timed["seconds"]}


def summary(found: Mapping[str, Mapping[str, Any]], figure: str) -> list[Row]:
    """The table's rows: each figure with its 95 % interval, and the share of what `2:4` loses that a row loses."""
    if not found:
        return []
    dense = figures(next(iter(found.values())), "before")
    values = {"dense": dense, **{name: figures(row, "after") for name, row in found.items()}}
    names = list(dict.fromkeys(name for row in values.values() for name in row))
    table: list[Row] = []
    for row, own in values.items():
        run = found.get(row)
        totals = run and run["totals"]
        table.append(
            {
                "row": row,
                **{name.replace("_", " "): own.get(name) for name in names},
                f"{figure.replace('_', ' ')} lost": share(values, row, figure),
                "cosine lost": share(values, row, "cosine"),
                "bytes": totals and totals["bytes_after"] / totals["bytes_before"],
                "seconds": run and run["seconds"],
            }
        )
    return table


def figures(row: Mapping[str, Any], when: str) -> dict[str, Mapping[str, Any]]:
    """Figures by name, of all measures."""
    measured = [both[when] for both in row["evaluation"].values() if isinstance(both, dict) and both.get(when)]
    return {name: value for one in measured for name, value in one.items() if isinstance(value, dict)}


def share(values: Mapping[str, Mapping[str, Any]], row: str, figure: str) -> float | None:
    """What a row loses of the figure, of what plain 2:4 loses. Where the dense model has none, it would be 1."""
    if BASE not in values:
        return None
    dense, base, own = (float(values[name].get(figure, {"value": 1})["value"]) for name in ("dense", BASE, row))
    return (dense - own) / (dense - base) if dense != base else None


def main() -> None:
    """Run the rows that are missing, then print the table of all that exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--block", type=int, nargs="+", default=[32])
    parser.add_argument("--rows", help="names, separated by commas; left out, all; `none` only prints")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/kinds"))
    parser.add_argument("--json", type=Path, help="also write the table's rows there")
    options = parser.parse_args()
    task, known = TASKS[options.task], rows(options.block)
    folder = options.results / options.task
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [] if options.rows == "none" else options.rows.split(",") if options.rows else list(known)
    for row in wanted:
        file = folder / f"{row.replace(' ', '-').replace(':', '-')}.json"
        if file.exists():
            continue
        print(f"{row} …", flush=True)
        with tempfile.TemporaryDirectory() as scratch:
            output = Path(scratch) / "checkpoint"
            found = run_row(row, recipe_of(task, known[row], folder, output), output)
            if task.more is not None:
                found["evaluation"]["more"] = task.more(output, folder)
        file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    found = {r["row"]: r for r in (json.loads(f.read_text(encoding="utf-8")) for f in folder.glob("*.json"))}
    table = summary({name: found[name] for name in known if name in found}, task.figure)
    names = {name.split()[-1] for row in table for name in row}
    digits = dict.fromkeys(names, ".4f") | {"lost": ".2f", "bytes": ".3f", "seconds": ".0f"}
    show(table, digits, options.json)


if __name__ == "__main__":
    main()
