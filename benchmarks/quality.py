"""What each method and each ingredient leaves of a model: perplexity on text of two genres at equal bytes and calibration.

    python benchmarks/quality.py --model models/smollm2-135m-instruct --block 64 \\
        --text handbook=handbook.txt --text essays=essays.txt [--rows paper,all] [--results benchmarks/results/quality]

A row is one `armor-apply` run in a process of its own, and one JSON file with its command; rows that exist are not run again.
Text is held out: another source than the calibration text. From it `--windows` windows of `--length` tokens are taken, evenly
spread. `gap` is the loss in nats a token above the dense model's, with a 95 % interval from 1,000 bootstrap resamples of
the windows (the same for every row); the last columns are the gap as a share of the row `paper`'s, resampled together.

`paper` stands for 20,000 steps of the paper's method (`adam`), which would take most of a day: `exact` with as many cycles as it
needs to end at that loss, by module type (`iterations` raised until it does, on the modules of `benchmarks/solver.py`).
`paper-uniform` takes the largest number for all.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from losses import Row, apply_apart, bootstrap, compared, interval, losses_of, read_texts, show
from torch import Tensor
from transformers import AutoModelForCausalLM

import armor_recipes
from armor_recipes.integrations.models import open_model
from armor_recipes.recipe.schema import ModelSpec

ATTENTION, MLP = r"re:.*self_attn\.(q|k|v|o)_proj$", r"re:.*mlp\.(gate|up|down)_proj$"
#: Cycles of `exact` after which the loss is that of 20,000 steps of `adam`, on layer 10 of SmolLM2-135M at block 64.
PAPER_CYCLES = {"attention": 46, "mlp": 21}

TEXTS = ("builtin:pydoc", "builtin:jargon", "builtin:speeches", "builtin:rustbook")

Stage = dict[str, dict[str, Any]]

#: How numbers of a column are printed, by the last word of its name.
DIGITS = {
    "perplexity": ".2f",
    "gap": ".4f",
    "share": ".3f",
    "bytes": ".3f",
    "factors": ".1%",
    "seconds": ".0f",
    "MB": ".0f",
}


@dataclass(frozen=True, slots=True)
class Setting:
    """What every row shares."""

    model: str
    block: int
    samples: int
    length: int
    calibration: str
    cycles: int
    device: str

    @property
    def tokens(self) -> dict[str, Any]:
        """The calibration section: equal parts of the texts."""
        texts = [{"dataset": text, "weight": 1} for text in self.calibration.split(",")]
        return {"dataset": texts, "samples": self.samples, "sequence_length": self.length, "batch_size": 1}


def plain(kind: str, **fields: Any) -> Callable[[Setting], Stage]:
    """A 2:4 method without factors."""
    return lambda _: {kind: {"targets": [ATTENTION, MLP], **fields}}


def adapted(kind: str, **fields: Any) -> Callable[[Setting], Stage]:
    """A 2:4 method with a low-rank correction of as many values as A and B have."""
    return lambda s: {kind: {"targets": [ATTENTION, MLP], "adapter_block": s.block, **fields}}


def paper(attention: int, mlp: int) -> Callable[[Setting], Stage]:
    """The paper's method, by the cycles of `exact` that match it."""

    def stage(s: Setting) -> Stage:
        common = {"block_size": s.block, "propagate": "dense"}
        return {
            "ARMORModifier@attention": {"targets": [ATTENTION], "iterations": attention, **common},
            "ARMORModifier@mlp": {"targets": [MLP], "iterations": mlp, **common},
        }

    return stage


def armor(*after: str, before: Sequence[str] = (), **fields: Any) -> Callable[[Setting], Stage]:
    """ARMOR by `exact` with our defaults, and what goes before and after it."""

    def stage(s: Setting) -> Stage:
        own = {
            "targets": [ATTENTION, MLP],
            "block_size": s.block,
            "iterations": s.cycles,
            "propagate": "dense",
            **fields,
        }
        return {**{kind: REST[kind] for kind in before}, "ARMORModifier": own, **{kind: REST[kind] for kind in after}}

    return stage


def smollm2(*after: str, **changed: Any) -> Callable[[Setting], Stage]:
    """ARMOR as in recipes/smollm2-135m.yaml, whose budget stands for block 64, with that of another block; and what goes after.

    `changed` fields are the same for all modules.
    """

    def stage(s: Setting) -> Stage:
        recipe = yaml.safe_load((Path(armor_recipes.__file__).parent / "recipes/smollm2-135m.yaml").read_text("utf-8"))
        fields = recipe["prune_stage"]["armor_modifiers"]["ARMORModifier"]
        budget = CORE_SHARE + (fields["block_size"]["budget"] - CORE_SHARE) * s.block / 64
        own = {**fields, "block_size": {"budget": round(budget, 6)}, **changed}
        return {"ARMORModifier": own, **{kind: REST[kind] for kind in after}}

    return stage


#: Bytes of a packed 2:4 core of 16-bit numbers, as a share of the dense weight's.
CORE_SHARE = 0.5 + 1 / 16
PERMUTE, REFINE, DISTIL = "ChannelPermutationModifier", "BlockRefineModifier", "DistillationModifier"
REST: dict[str, dict[str, Any]] = {
    PERMUTE: {"targets": [r"re:.*mlp\.down_proj$"]},
    REFINE: {},
    DISTIL: {},
}
EVERYTHING: dict[str, Any] = {
    "objective": "hessian",
    "propagate": "matched",
    "share_input_factor": True,
}

ROWS: dict[str, Callable[[Setting], Stage] | None] = {
    "dense": None,
    "magnitude": plain("MagnitudeModifier"),
    "wanda": plain("WandaPruningModifier", pattern="2:4"),
    "sparsegpt": plain("SparseGPTModifier", pattern="2:4"),
    "sparsegpt, damping 0.1": plain("SparseGPTModifier", pattern="2:4", dampening_frac=0.1),
    "sparsegpt, compressed order": plain("SparseGPTModifier", pattern="2:4", propagate="compressed"),
    "nowag": plain("NoWagModifier"),
    "nowag + adapter": adapted("NoWagModifier"),
    "sparsegpt + adapter": adapted("SparseGPTModifier", pattern="2:4", dampening_frac=0.1),
    "paper": paper(PAPER_CYCLES["attention"], PAPER_CYCLES["mlp"]),
    "paper-uniform": paper(max(PAPER_CYCLES.values()), max(PAPER_CYCLES.values())),
    "exact diagonal": armor(),
    "exact diagonal, compressed inputs": armor(propagate="compressed"),
    "exact diagonal, not normalised": armor(normalize=False),
    "exact diagonal, gradients": armor(gradient_power=0.5),
    "exact hessian": armor(objective="hessian"),
    "exact hessian, shrinkage 0.5": armor(objective="hessian", shrinkage=0.5),
    "exact diagonal + matched": armor(propagate="matched"),
    "exact hessian + matched": armor(objective="hessian", propagate="matched"),
    "exact hessian + matched, not normalised": armor(objective="hessian", propagate="matched", normalize=False),
    "exact diagonal + shared B": armor(share_input_factor=True),
    "exact diagonal + permutation": armor(before=[PERMUTE]),
    "exact diagonal + block refinement": armor(REFINE),
    "exact diagonal + distillation": armor(DISTIL),
    "recipe, not distilled": smollm2(),
    "recipe": smollm2(DISTIL),
    "recipe, hessian": smollm2(DISTIL, objective="hessian"),
    "all": armor(REFINE, DISTIL, before=[PERMUTE], **EVERYTHING),
    "all but hessian": armor(REFINE, DISTIL, before=[PERMUTE], **{**EVERYTHING, "objective": "diagonal"}),
    "all but matched": armor(REFINE, DISTIL, before=[PERMUTE], **{**EVERYTHING, "propagate": "compressed"}),
    "all but shared B": armor(REFINE, DISTIL, before=[PERMUTE], **{**EVERYTHING, "share_input_factor": False}),
    "all but permutation": armor(REFINE, DISTIL, **EVERYTHING),
    "all but block refinement": armor(DISTIL, before=[PERMUTE], **EVERYTHING),
    "all but distillation": armor(REFINE, before=[PERMUTE], **EVERYTHING),
}


def recipe_of(row: str, setting: Setting, output: Path) -> dict[str, Any]:
    """The recipe of a row as a mapping."""
    stage = ROWS[row]
    assert stage is not None
    recipe: dict[str, Any] = {
        "model": setting.model,
        "calibration": setting.tokens,
        "prune_stage": {"row_modifiers": stage(setting)},
        "output": {"path": str(output)},
    }
    return recipe


def run_row(row: str, setting: Setting, texts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Apply the row's recipe in a process of its own, measure what it wrote, and throw the checkpoint away."""
    if ROWS[row] is None:
        return {"row": row, "losses": losses_of(dense_model(model_folder(setting.model), setting.device), texts)}
    with tempfile.TemporaryDirectory() as scratch:
        folder, file = Path(scratch) / "checkpoint", Path(scratch) / "recipe.yaml"
        apply_apart(f"row {row!r}", recipe_of(row, setting, folder), file, "--device", setting.device)
        return measure_row(row, folder, texts, setting.device)


def measure_row(row: str, folder: Path, texts: Mapping[str, Tensor], device: str) -> dict[str, Any]:
    """Losses of a checkpoint that a run wrote, with what its manifest and report say."""
    manifest, figures = (json.loads((folder / f).read_text()) for f in ("armor_manifest.json", "report.json"))
    model = (
        armor_recipes.load(folder, backend="folded", dtype=torch.float32, device=device)
        if packed(manifest)
        else dense_model(str(folder), device)
    )
    return {
        "row": row,
        "command": f"armor-apply recipe.yaml --device {device}",
        "recipe": yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8")),
        "losses": losses_of(model, texts),
        "totals": manifest["totals"],
        "mean_loss": statistics.fmean(m["stored_loss"] for m in manifest["modules"].values()),
        "refinements": manifest["refinements"],
        "seconds": figures["seconds"],
        "seconds_by_phase": figures["seconds_by_phase"],
        "peak_memory_bytes": figures["peak_memory_bytes"],
        "threads": figures["threads"],
        "processor": processor(device),
    }


def packed(manifest: Mapping[str, Any]) -> bool:
    """Whether the checkpoint holds factors."""
    return bool(manifest["totals"]["factor_bytes"])


def dense_model(folder: str, device: str) -> Any:
    """A checkpoint of plain weights, through stock transformers."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device)


def processor(device: str) -> str:
    """What the row ran on: a GPU by its name."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else device


def model_folder(model: str) -> str:
    """The folder or hub id behind a recipe's model name."""
    return str(open_model(ModelSpec(id=model), device=torch.device("cpu")).folder or model)


def summary(rows: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """The table's rows; none as long as there is no dense model to compare with."""
    dense, reference = rows.get("dense"), rows.get("paper")
    if dense is None:
        return []
    table: list[Row] = []
    for name, row in rows.items():
        cells: Row = {"row": name}
        for text, own in row["losses"].items():
            perplexity, gap, _ = compared(own, dense["losses"][text])
            cells |= {f"{text} perplexity": perplexity, f"{text} gap": gap}
            cells[f"{text} share"] = reference and share(own, reference["losses"][text], dense["losses"][text])
        totals, on = row.get("totals"), row.get("processor", "cpu")
        cells["bytes"] = totals and totals["bytes_after"] / totals["bytes_before"]
        cells["factors"] = totals and totals["factor_bytes"] / totals["bytes_before"]
        cells["seconds"], cells["on"] = row.get("seconds"), None if row.get("seconds") is None else on
        cells["peak MB"] = row["peak_memory_bytes"] / 1e6 if row.get("peak_memory_bytes") else None
        table.append(cells)
    return table


def share(own: Sequence[float], reference: Sequence[float], dense: Sequence[float]) -> Row:
    """The gap as a part of the reference's gap, resampled together."""
    gap, other = (
        torch.tensor(losses, dtype=torch.float64) - torch.tensor(dense, dtype=torch.float64)
        for losses in (own, reference)
    )
    return {"value": float(gap.mean() / other.mean()), "interval": list(interval(bootstrap(gap) / bootstrap(other)))}


def main() -> None:
    """Run the rows that are missing, then print the table of all that exist."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="builtin:stdlib-llama")
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--cycles", type=int, default=50, help="of `exact`, where the row does not say how many")
    parser.add_argument("--calibration", default=",".join(TEXTS), help="texts in equal parts")
    parser.add_argument("--text", action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="for runs and evaluation, as of `armor-apply`")
    parser.add_argument("--rows", default=",".join(ROWS), help="names, separated by commas; `none` only prints")
    parser.add_argument("--checkpoint", type=Path, help="measure this folder as the one row given, without a run")
    parser.add_argument("--results", type=Path, default=Path("benchmarks/results/quality"))
    parser.add_argument("--json", type=Path, help="also write the table's rows there")
    options = parser.parse_args()
    setting = Setting(
        options.model,
        options.block,
        options.samples,
        options.length,
        options.calibration,
        options.cycles,
        options.device,
    )
    folder = options.results / f"{Path(options.model.replace(':', '-')).name}-block{options.block}"
    folder.mkdir(parents=True, exist_ok=True)
    texts = read_texts(options.text, model_folder(options.model), windows=options.windows, length=options.length)
    for row in [] if options.rows == "none" else split_rows(options.rows):
        file = folder / f"{row.replace(' ', '-').replace(',', '')}.json"
        if not file.exists():
            print(f"{row} …", flush=True)
            at = options.checkpoint
            found = run_row(row, setting, texts) if at is None else measure_row(row, at, texts, setting.device)
            file.write_text(json.dumps(found) + "\n", encoding="utf-8")
    rows = {r["row"]: r for r in (json.loads(f.read_text(encoding="utf-8")) for f in folder.glob("*.json"))}
    show(summary({name: rows[name] for name in ROWS if name in rows}), DIGITS, options.json)


def split_rows(text: str) -> list[str]:
    """Names of rows, separated by commas; some names hold a comma themselves, so the longest match wins."""
    rows, rest = [], text
    while rest:
        name = max((n for n in ROWS if rest == n or rest.startswith(n + ",")), key=len, default=None)
        if name is None:
            raise SystemExit(f"unknown row at {rest!r}; rows are: {'; '.join(ROWS)}")
        rows.append(name)
        rest = rest[len(name) + 1 :]
    return rows


if __name__ == "__main__":
    main()
